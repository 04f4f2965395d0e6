"""Held-out loss: cross entropy on the reference answers, in nats a supervised token.

examples → tokens and loss masks of the chat format → shards → batches of similar length, as large
as the vocabulary allows → nats of every row → one file.
The mean is over tokens, not over rows, so a long answer counts for its length. Losses of models are
comparable only over the same tokens; `same_tokens` finds out.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medtrain.data.examples import Example
from medtrain.errors import DataError
from medtrain.files import read_jsonl
from medtrain.generate.transformers_engine import context_length
from medtrain.shards import Request

if TYPE_CHECKING:
    from medtrain.data.chat import ChatTokenizer, Encoded

_LOGITS_BYTES = 1 << 29
MAX_ROWS = 32
"""Of a batch."""
_FLOAT32_BYTES = 4


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
    load: Callable[[], Any], batches: Iterable[Sequence[Request]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run the model over reference answers; yields (row id, nats, tokens, whether it was cut).

    A batch of the plan is cut further by the rows' lengths and the vocabulary alone, so the figures
    do not move with a setting.
    """
    # Before the first batch is taken: a death while loading is not the fault of its rows.
    model = load()
    for rows in batches:
        context = context_length(model)
        lengths = [int(min(len(row.payload["tokens"]), context)) for row in rows]
        for batch in _batches(lengths, model.config.get_text_config().vocab_size):
            cut = [rows[i].payload["tokens"][: lengths[i]] for i in batch]
            masks = [rows[i].payload["mask"][: lengths[i]] for i in batch]
            for i, row in zip(batch, _row_losses(model, cut, masks), strict=True):
                was_cut = len(rows[i].payload["tokens"]) > context
                yield rows[i].id, {"nats": row.nats, "tokens": row.tokens, "cut": was_cut}


def _batches(lengths: Sequence[int], vocab_size: int) -> Iterator[list[int]]:
    """Positions of rows of similar length whose padded logits stay within bounds."""
    max_tokens = _LOGITS_BYTES // (_FLOAT32_BYTES * vocab_size)
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        # The row at hand is the longest so far: all rows of its batch are padded to it.
        if batch and ((len(batch) + 1) * lengths[i] > max_tokens or len(batch) == MAX_ROWS):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _row_losses(
    model: Any, input_ids: Sequence[Sequence[int]], masks: Sequence[Sequence[int]]
) -> Iterator[RowLoss]:
    import torch

    longest = max(map(len, input_ids))
    tokens = torch.zeros(len(input_ids), longest, dtype=torch.long)  # (batch, tokens)
    present = torch.zeros_like(tokens)
    for row, ids in enumerate(input_ids):
        tokens[row, : len(ids)] = torch.tensor(ids)
        present[row, : len(ids)] = 1
    first = max(0, min(_first_supervised(mask) for mask in masks) - 1)
    # Logits of prompts are never looked at; most models can leave them out.
    keep = (
        {"logits_to_keep": longest - first}
        if "logits_to_keep" in inspect.signature(model.forward).parameters
        else {}
    )
    with torch.inference_mode():
        logits = model(
            input_ids=tokens.to(model.device),
            attention_mask=present.to(model.device),
            use_cache=False,
            **keep,
        ).logits  # (batch, tokens kept, vocabulary)
    skipped = longest - logits.shape[1]
    for row, (ids, mask) in enumerate(zip(input_ids, masks, strict=True)):
        # The first token is predicted by nothing.
        targets = [t for t in range(1, len(ids)) if mask[t]]
        if not targets:
            yield RowLoss(0.0, 0)
            continue
        predicted = logits[row, [t - 1 - skipped for t in targets]].float()  # (targets, vocabulary)
        wanted = tokens[row, targets].to(predicted.device)
        nats = torch.nn.functional.cross_entropy(predicted, wanted, reduction="none")
        yield RowLoss(math.fsum(nats.tolist()), len(targets))


def _first_supervised(mask: Sequence[int]) -> int:
    return next((i for i, supervised in enumerate(mask) if supervised), len(mask))
