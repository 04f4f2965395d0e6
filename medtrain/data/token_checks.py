"""Rows checked on the tokens they really become: length, loss, forged control tokens.

cleaned rows → chat.encode_many → kept rows with their token counts, or a rejection with its reason

A row whose text spells a control token (`<|im_end|>`, `</s>`, `[INST]`) would end its own turn or
open a forged one, so it is not used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from medtrain.console import Console, ProgressTask
from medtrain.data.chat import ChatTokenizer, Encoded, LossOn
from medtrain.data.examples import Example, Message, Preference
from medtrain.data.templates import has_marks
from medtrain.data.templates.rendering import ChatFormatError
from medtrain.data.tokenizer import control_tokens
from medtrain.errors import MedtrainError

Reject = Callable[[dict[str, Any]], None]
Row = TypeVar("Row", Example, Preference)
Conversation = Sequence[Message]

_CHUNK_ROWS = 1024
_SAMPLE_ROWS = 32
_HISTOGRAM_BINS = 16


class Limit(NamedTuple):
    """Most tokens of a row, and the setting that says so."""

    tokens: int
    setting: str


class Problem(NamedTuple):
    """Why a row cannot be used."""

    reason: Literal["chat-format", "control-token", "too-long", "no-loss"]
    detail: str


@dataclass
class TokenCounts:
    """The lengths of a split's rows, in tokens; a preference row counts as two."""

    lengths: list[int] = field(default_factory=list)
    supervised: int = 0
    truncated: int = 0

    def add(self, row: Encoded, limit: int) -> None:
        """Count one row, cut to the limit."""
        self.lengths.append(min(limit, len(row.input_ids)))
        self.supervised += sum(row.loss_mask[:limit])
        self.truncated += len(row.input_ids) > limit

    def to_json(self) -> dict[str, Any]:
        """For the data card."""
        if not self.lengths:
            return {"total": 0, "supervised": 0}
        lengths = np.asarray(self.lengths)
        return {
            "total": int(lengths.sum()),
            "supervised": self.supervised,
            "min": int(lengths.min()),
            "mean": round(float(lengths.mean()), 1),
            "p95": int(np.percentile(lengths, 95, method="inverted_cdf")),
            "max": int(lengths.max()),
            "truncated_rows": self.truncated,
            "histogram": _histogram(lengths),
        }


def _histogram(lengths: Any) -> dict[str, Any]:
    """Rows by length: `rows[i]` have more than `i` and up to `i + 1` times `width` tokens."""
    width = max(1, math.ceil(int(lengths.max()) / _HISTOGRAM_BINS))
    bins = np.bincount((np.maximum(lengths, 1) - 1) // width)
    return {"width": width, "rows": bins.tolist()}


class TokenChecks:
    """The checks of one run; every split passes through `keep`."""

    def __init__(
        self,
        chat: ChatTokenizer,
        reject: Reject,
        *,
        loss_on: LossOn = "assistant",
        too_long: Literal["reject", "truncate"] = "reject",
    ) -> None:
        self._chat, self._reject = chat, reject
        self._loss_on, self._too_long = loss_on, too_long
        tokens = control_tokens(chat.tokenizer, chat.format.source)
        self._control = tuple(dict.fromkeys((*chat.format.text_marks, *tokens)))
        self._control_starts = {spelling[0] for spelling in self._control}
        self._rejected: set[str] = set()

    def keep(
        self, rows: Sequence[Row], limit: Limit, progress: ProgressTask | None = None
    ) -> tuple[list[Row], TokenCounts]:
        """The rows of a split that can be used, and their lengths."""
        kept: list[Row] = []
        counts = TokenCounts()
        for start in range(0, len(rows), _CHUNK_ROWS):
            chunk = rows[start : start + _CHUNK_ROWS]
            for row, encoded in self._encode(chunk):
                problem = self._problem(row, encoded, limit)
                if problem is not None:
                    self._turn_away(row, problem)
                    continue
                kept.append(row)
                for version in encoded:
                    counts.add(version, limit.tokens)
            if progress is not None:
                progress.advance(len(chunk))
        return kept, counts

    def _encode(self, rows: Sequence[Row]) -> Iterator[tuple[Row, list[Encoded]]]:
        """Each row with its conversations' ids; a row that does not fit the template is rejected
        here."""
        versions = [_conversations(row) for row in rows]
        try:
            encoded = iter(self._chat.encode_many([c for v in versions for c in v], self._loss_on))
        except ChatFormatError as error:
            if len(rows) == 1:
                self._turn_away(rows[0], Problem("chat-format", error.message))
                return
            for row in rows:
                yield from self._encode([row])
            return
        for row, conversations in zip(rows, versions, strict=True):
            yield row, [next(encoded) for _ in conversations]

    def _problem(self, row: Row, encoded: list[Encoded], limit: Limit) -> Problem | None:
        if forged := self._forged(row):
            return Problem("control-token", f"the text spells {', '.join(forged)}")
        longest = max(len(version.input_ids) for version in encoded)
        if longest > limit.tokens and self._too_long == "reject":
            return Problem("too-long", f"{longest} tokens; {limit.setting} is {limit.tokens}")
        if not all(any(version.loss_mask[: limit.tokens]) for version in encoded):
            return Problem("no-loss", f"no answer within {limit.setting}={limit.tokens} tokens")
        return None

    def _forged(self, row: Row) -> list[str]:
        texts = [text for text in _texts(row) if any(c in text for c in self._control_starts)]
        return [token for token in self._control if any(token in text for text in texts)]

    def _turn_away(self, row: Row, problem: Problem) -> None:
        # With preference_prompts_from=train a row stands in two splits; it is one rejected row.
        if row.id in self._rejected:
            return
        self._rejected.add(row.id)
        self._reject(
            {
                "source": row.source,
                "file": None,
                "row": None,
                **problem._asdict(),
                "content": row.to_json(),
            }
        )


def check_sample(chat: ChatTokenizer, examples: Sequence[Example], console: Console) -> None:
    """Compare some rows with what transformers' own `apply_chat_template` makes of them.

    Raises:
        MedtrainError: a prompt is not how its answered row begins, or loss is not on the answer.
    """
    step = max(1, len(examples) // _SAMPLE_ROWS)
    sample = examples[::step][:_SAMPLE_ROWS]
    different = 0
    for example in sample:
        row = chat.encode(example.messages)
        prompt = chat.encode_prompt(example.prompt)
        answer = row.input_ids[len(prompt) :]
        if row.input_ids[: len(prompt)] != prompt or not all(row.loss_mask[len(prompt) :]):
            raise MedtrainError(
                f"The chat format gives row {example.id} a prompt that is not how the row begins",
                fix="Use model.chat_template=chatml, and please report this template.",
            )
        if not answer or answer[-1] != chat.end_token_id:
            raise MedtrainError(f"The answer of row {example.id} does not end with its end token")
        different += not _is_what_transformers_makes(chat, example, row)
    if different:
        console.warn(
            "template_sample",
            f"{different} of {len(sample)} sampled rows get other tokens where the answer begins "
            "than apply_chat_template gives the whole conversation; training follows what the "
            "model is given when it is to answer",
            different=different,
            sampled=len(sample),
        )


def _is_what_transformers_makes(chat: ChatTokenizer, example: Example, row: Encoded) -> bool:
    marked = has_marks(chat.format.source)
    whole = chat.tokenizer.apply_chat_template(
        list(example.messages),
        chat_template=chat.format.source,
        return_dict=True,
        return_assistant_tokens_mask=marked,
    )
    length = len(row.input_ids)
    same_mask = not marked or whole["assistant_masks"][:length] == row.loss_mask
    return bool(whole["input_ids"][:length] == row.input_ids and same_mask)


def _conversations(row: Example | Preference) -> list[Conversation]:
    if isinstance(row, Example):
        return [row.messages]
    answers: list[Message] = [
        {"role": "assistant", "content": text} for text in (row.chosen, row.rejected)
    ]
    return [(*row.prompt, answer) for answer in answers]


def _texts(row: Example | Preference) -> list[str]:
    return [m["content"] for conversation in _conversations(row) for m in conversation]
