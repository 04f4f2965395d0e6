"""Held-out loss: cross entropy on the reference answers, in nats a supervised token.

examples → tokens and loss masks of the chat format → shards → passes of a bounded number of tokens,
packed as in training (medtrain.train.log_probs) → nats of every row → one file.
The mean is over tokens, not over rows, so a long answer counts for its length. Losses of models are
comparable only over the same tokens; `same_tokens` finds out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medtrain.console import Console
from medtrain.data.examples import Example
from medtrain.errors import DataError
from medtrain.files import read_jsonl
from medtrain.generate.transformers_engine import context_length
from medtrain.shards import Request

if TYPE_CHECKING:
    from medtrain.data.chat import ChatTokenizer, Encoded
    from medtrain.train.log_probs import Row, Scorer

MAX_ROWS = 32
"""Of a batch."""
_SCORER = "_medtrain_scorer"
"""The attribute of a model that keeps what was made of it for scoring."""


@dataclass(frozen=True)
class RowLoss:
    """One reference answer."""

    nats: float
    """Sum over its supervised tokens."""
    tokens: int


@dataclass(frozen=True)
class HeldOutLoss:
    """The loss of one model on all reference answers."""

    rows: Mapping[str, RowLoss]
    """By example id; a row none of whose supervised tokens fits the model is absent."""
    cut: int
    """Rows longer than the model's context, measured up to its end."""
    failed: int = 0
    """Rows that were given up on because they killed their process."""

    @property
    def tokens(self) -> int:
        """Supervised tokens of all rows."""
        return sum(row.tokens for row in self.rows.values())

    @property
    def value(self) -> float:
        """Nats a token."""
        return math.fsum(row.nats for row in self.rows.values()) / self.tokens

    @property
    def note(self) -> str:
        """How it was measured."""
        cut = f", {self.cut} rows cut at the model's context" if self.cut else ""
        failed = f", {self.failed} rows failed" if self.failed else ""
        return f"nats a token over {self.tokens} tokens of the reference answers{cut}{failed}"

    def of(self, example_id: str) -> float | None:
        """Nats a token of one row."""
        row = self.rows.get(example_id)
        return None if row is None else row.nats / row.tokens

    @classmethod
    def read(cls, collected: Path) -> HeldOutLoss:
        """From the collected rows.

        Raises:
            DataError: not one supervised token fits the model's context.
        """
        everything = list(read_jsonl(collected))
        lines = [line for line in everything if "error" not in line]
        rows = {line["id"]: RowLoss(line["nats"], line["tokens"]) for line in lines}
        measured = {row_id: row for row_id, row in rows.items() if row.tokens}
        if not measured:
            raise DataError(
                "No reference answer fits the model's context, so there is no held-out loss",
                fix="Set evaluate.held_out_loss=false, or use shorter evaluation rows.",
            )
        failed = len(everything) - len(lines)
        return cls(measured, sum(line["cut"] for line in lines), failed)


def encode_references(chat: ChatTokenizer, examples: Sequence[Example]) -> list[Encoded]:
    """The whole conversations, with loss on the assistant's tokens."""
    return list(chat.encode_many([example.messages for example in examples], "assistant"))


def same_tokens(one: Sequence[Encoded], other: Sequence[Encoded]) -> bool:
    """Whether two chat formats make the same tokens of the rows, and supervise the same ones."""
    return all(
        list(a.input_ids) == list(b.input_ids) and list(a.loss_mask) == list(b.loss_mask)
        for a, b in zip(one, other, strict=True)
    )


def loss_requests(examples: Sequence[Example], encoded: Sequence[Encoded]) -> list[Request]:
    """A request a reference answer; what it costs is its length in tokens."""
    return [
        Request(
            example.id,
            {"tokens": list(e.input_ids), "mask": list(e.loss_mask)},
            cost=len(e.input_ids),
        )
        for example, e in zip(examples, encoded, strict=True)
    ]


def measure_losses(
    load: Callable[[], Any],
    batches: Iterable[Sequence[Request]],
    attention: str,
    console: Console | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run the model over reference answers; yields (row id, nats, tokens, whether it was cut).

    A batch of the plan is cut further by the rows' lengths alone, so the figures do not move with a
    setting.

    Args:
        load: gives the model, which somebody else may use between batches.
        batches: of reference answers.
        attention: `model.attention`.
        console: is told how rows attend; None tells nobody.
    """
    from medtrain.train.log_probs import Row

    # Before the first batch is taken: a death while loading is not the fault of its rows.
    model = load()
    for batch in batches:
        context = context_length(model)
        ends = [int(min(len(one.payload["tokens"]), context)) for one in batch]
        rows = [
            Row(one.payload["tokens"][:end], one.payload["mask"][:end])
            for one, end in zip(batch, ends, strict=True)
        ]
        sums = _log_probs(model, rows, attention, console)
        for one, row, nats in zip(batch, rows, sums, strict=True):
            tokens = sum(map(bool, row.scored[1:]))
            cut = len(one.payload["tokens"]) > context
            yield one.id, {"nats": -nats if tokens else 0.0, "tokens": tokens, "cut": cut}


def _log_probs(
    model: Any, rows: Sequence[Row], attention: str, console: Console | None
) -> list[float]:
    """The log-probability of each row's scored tokens, packed where the model allows it."""
    from medtrain.attention.families import why_not_packed
    from medtrain.attention.packed import computing_packed
    from medtrain.train.computing import tell_attention
    from medtrain.train.log_probs import scorer_of

    packed = attention != "eager" and why_not_packed(model.config) is None
    known = hasattr(model, _SCORER)
    if not known:
        setattr(model, _SCORER, scorer_of(model, packed=packed))
    scorer: Scorer = getattr(model, _SCORER)
    with computing_packed(model, attention) if packed else nullcontext():
        if console is not None and not known:
            tell_attention(model, "evaluate", console, packed=packed)
        return scorer.sums(rows)
