"""Decode one batch with a transformers model: prompts in, token ids out.

pad left → run the prompts once each → repeat the cache for every sample → draw, append, run the new
tokens → rows that ended leave the batch → until none is left.
A plain loop instead of `model.generate`: it shares the prompt between samples, lets finished rows
go, draws each row by its own numbers, and is deterministic in what the batch contains, which
continuous batching (whose composition depends on timing) is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from medtrain.errors import MedtrainError
from medtrain.generate.cache import buffered_cache, keep_rows
from medtrain.generate.draw import NOT_A_NUMBER, draw
from medtrain.generate.engine import Finish
from medtrain.generate.forward import Forward
from medtrain.generate.sampling import Sampling, uniforms

SHRINK_AT = 0.25
"""The batch is made smaller when this share of its rows has ended: copying the cache costs about
as much as a step."""


@dataclass(slots=True)
class Row:
    """One answer in the making."""

    seed: int
    max_tokens: int
    tokens: list[int] = field(default_factory=list)
    finish: Finish | None = None

    def take(self, token: int, stop: frozenset[int]) -> None:
        """Append a drawn token, or end."""
        if self.finish is not None:
            return
        if token in stop:
            self.finish = "stop"
            return
        self.tokens.append(token)
        if len(self.tokens) >= self.max_tokens:
            self.finish = "length"


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and the answers that are wanted of it."""

    prompt: Sequence[int]
    """Token ids, not empty."""
    rows: Sequence[Row]
    """At least one; filled in place."""
    tag: Any = None
    """The caller's own."""

    @property
    def is_answered(self) -> bool:
        """Whether all its rows have ended."""
        return all(row.finish is not None for row in self.rows)

    @property
    def positions(self) -> int:
        """That its longest row can take."""
        return len(self.prompt) + max(row.max_tokens for row in self.rows)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The token ids that decoding needs to know."""

    size: int
    """Ids from here on have a row in the model but no meaning: they are never drawn."""
    pad: int
    stop: frozenset[int]


@torch.inference_mode()
def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[Sequence[Row]],
    sampling: Sampling,
    vocabulary: Vocabulary,
) -> None:
    """Fill the rows of every prompt with drawn tokens.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        prompts: token ids, none empty.
        rows: the answers wanted of each prompt, at least one; changed in place.
        sampling: how to draw.
        vocabulary: stop, pad, size.

    Raises:
        MedtrainError: the model's output is not a number.
    """
    batch = Batch(model, prompts, vocabulary.pad)
    batch.keep([i for i, samples in enumerate(rows) for _ in samples])
    live = [row for samples in rows for row in samples]
    steps = max(row.max_tokens for row in live)
    numbers = torch.stack([_numbers(row, steps, sampling) for row in live])  # (rows, steps)
    for step in range(steps):
        tokens = draw(batch.logits[:, : vocabulary.size], numbers[:, step], sampling)
        for row, token in zip(live, tokens.tolist(), strict=True):
            if token == NOT_A_NUMBER and row.finish is None:
                raise not_a_number(model)
            row.take(token, vocabulary.stop)
        going = [i for i, row in enumerate(live) if row.finish is None]
        if not going:
            return
        if len(going) <= (1 - SHRINK_AT) * len(live):
            live, tokens, numbers = [live[i] for i in going], tokens[going], numbers[going]
            batch.keep(going)
        batch.advance(tokens)


def _numbers(row: Row, steps: int, sampling: Sampling) -> Tensor:
    if sampling.greedy:
        return torch.zeros(steps, dtype=torch.float64)
    return torch.from_numpy(uniforms(row.seed, steps))


class Batch:
    """The model's state for the rows that are being decoded."""

    logits: Tensor
    """(rows, vocabulary), of each row's next token."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], pad: int) -> None:
        """Run the prompts, padded on the left."""
        self._forward, self._device = Forward(model), model.device
        self._cache = buffered_cache(model.config)
        tokens, self._mask = _pad_left(prompts, pad, self._device)  # (prompts, longest)
        positions = (self._mask.cumsum(dim=-1) - 1).clamp(min=0)
        self._next_position = positions[:, -1:] + 1  # (rows, 1)
        self._run(tokens, positions)

    def keep(self, rows: list[int]) -> None:
        """Make the batch these rows, in this order, repeated as often as they are named."""
        if rows == list(range(len(self._mask))):
            return
        keep_rows(self._cache, rows, self._device)
        self._mask, self._next_position = self._mask[rows], self._next_position[rows]
        self.logits = self.logits[rows]

    def advance(self, tokens: Tensor) -> None:
        """Run one more token of every row."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=-1)
        self._run(tokens[:, None].to(self._device), self._next_position)
        self._next_position = self._next_position + 1

    def _run(self, tokens: Tensor, positions: Tensor) -> None:
        self.logits = self._forward(tokens, positions, self._mask, self._cache)


def _pad_left(
    prompts: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both (prompts, longest), the prompts' ends in line."""
    longest = max(map(len, prompts))
    tokens = torch.full((len(prompts), longest), pad)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, longest - len(prompt) :] = 1
    return tokens.to(device), mask.to(device)


def not_a_number(model: Any) -> MedtrainError:
    """What to raise where logits are NaN."""
    return MedtrainError(
        f"The model's output is not a number (dtype {model.dtype})",
        fix="Its weights are damaged, or too large for float16: train and merge again with "
        "model.dtype=bfloat16 or float32.",
    )
