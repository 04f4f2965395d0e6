"""What a process reads in every optimiser step: its forward passes, as tensors.

dataset of token ids + `BatchPlan` → this process's rows of a step → padded tensors for TRL's
losses, and where the tokens lie in one sequence (medtrain.train.packed) → `StepBatch`. Padding of
the tensors is a few integers; what is computed of it is up to the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from medtrain.train.batches import BatchPlan
from medtrain.train.packed import pack
from medtrain.train.reading import pinned
from medtrain.train.rows import IGNORED

Inputs = dict[str, Any]
Collate = Callable[[Sequence[dict[str, Any]]], Inputs]
"""Rows of the dataset → the inputs of one forward pass."""


@dataclass(frozen=True)
class Forward:
    """One forward pass."""

    inputs: Inputs
    rows: tuple[int, ...]
    """Numbers in the dataset; none where a process only takes part in the others' communication."""


@dataclass(frozen=True)
class StepBatch:
    """What one process computes in one optimiser step."""

    forwards: tuple[Forward, ...]
    items: int
    """Tokens with a loss in the whole step, of all processes."""


def supervised_batch(pad_token_id: int, *, packed: bool) -> Collate:
    """Collate rows of `input_ids` and `labels` for SFTTrainer's loss."""

    def collate(rows: Sequence[dict[str, Any]]) -> Inputs:
        input_ids = _padded([row["input_ids"] for row in rows], pad_token_id)
        labels = _padded([row["labels"] for row in rows], IGNORED)
        mask = _padded([[1] * len(row["input_ids"]) for row in rows], 0)
        inputs: Inputs = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
        return _with_packed(inputs, labels, packed)

    return collate


def preference_batch(pad_token_id: int, *, packed: bool) -> Collate:
    """Collate preference pairs for DPOTrainer's loss: chosen answers, then the rejected ones."""

    def collate(rows: Sequence[dict[str, Any]]) -> Inputs:
        inputs = _answers(rows, ("chosen_ids", "rejected_ids"), pad_token_id, packed)
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in rows[0]:
                inputs[name] = _sums(rows, name)
        return inputs

    return collate


def unpaired_batch(pad_token_id: int, *, packed: bool) -> Collate:
    """Collate preference pairs for KTOTrainer's loss: each answer is an example of its own.

    `mismatched` holds the same prompts with answers to others, for the estimate of the divergence.
    """

    def collate(rows: Sequence[dict[str, Any]]) -> Inputs:
        inputs = _answers(rows, ("chosen_ids", "rejected_ids"), pad_token_id, packed)
        other = _answers(rows, ("other_chosen_ids", "other_rejected_ids"), pad_token_id, packed)
        inputs["label"] = torch.tensor([True] * len(rows) + [False] * len(rows))
        inputs["ref_logps"] = _sums(rows, "ref_chosen_logps", "ref_rejected_logps")
        other["ref_logps"] = _sums(rows, "ref_other_chosen_logps", "ref_other_rejected_logps")
        return {**inputs, "mismatched": other}

    return collate


def _answers(
    rows: Sequence[dict[str, Any]], sides: Sequence[str], pad_token_id: int, packed: bool
) -> Inputs:
    """The rows' prompts with the answers of the first side, then with those of the others."""
    answers = [(row["prompt_ids"], row[side]) for side in sides for row in rows]
    input_ids = _padded([prompt + answer for prompt, answer in answers], pad_token_id)
    completion = _padded([[0] * len(p) + [1] * len(a) for p, a in answers], 0)
    mask = _padded([[1] * (len(p) + len(a)) for p, a in answers], 0)
    inputs: Inputs = {
        "input_ids": input_ids,
        "attention_mask": mask,
        "completion_mask": completion,
    }
    return _with_packed(inputs, input_ids.masked_fill(completion == 0, IGNORED), packed)


def _sums(rows: Sequence[dict[str, Any]], *names: str) -> torch.Tensor:
    """Columns of sums one after another, (names x rows,)."""
    return torch.tensor([row[name] for name in names for row in rows], dtype=torch.float32)


def _with_packed(inputs: Inputs, labels: torch.Tensor, packed: bool) -> Inputs:
    if packed:
        inputs["packed"] = pack(inputs["attention_mask"], labels)
    return inputs


def _padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """(rows, longest), padded on the right."""
    padded = torch.full((len(rows), max(map(len, rows))), value, dtype=torch.long)
    for place, row in enumerate(rows):
        padded[place, : len(row)] = torch.tensor(row, dtype=torch.long)
    return padded


class StepLoader(DataLoader):  # type: ignore[type-arg]
    """The steps of an epoch, one `StepBatch` each; `set_epoch` says of which."""

    def __init__(
        self,
        dataset: Any,
        plan: BatchPlan,
        collate: Collate,
        *,
        process: int,
        items: Sequence[int] | None = None,
        workers: int = 0,
    ) -> None:
        """Read for one process.

        Args:
            dataset: a datasets.Dataset of token ids.
            plan: the steps.
            collate: makes tensors of rows.
            process: this process's number.
            items: tokens with a loss of every row; None where the loss is a mean over rows.
            workers: processes that read ahead.
        """
        self.steps = _EpochSteps(plan.steps_per_epoch)
        super().__init__(
            _Steps(dataset, plan, collate, process, items),
            batch_sampler=self.steps,
            collate_fn=_only,
            num_workers=workers,
        )

    def set_epoch(self, epoch: int) -> None:
        """Go on with the steps of this epoch, counted from 0."""
        self.steps.set_epoch(epoch)


class _EpochSteps(Sampler[list[tuple[int, int]]]):
    """(epoch, step) of every step, as batches of one."""

    def __init__(self, steps: int) -> None:
        self._steps, self._epoch = steps, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self._epoch
        return iter([[(epoch, step)] for step in range(self._steps)])


@dataclass(frozen=True)
class _Steps(Dataset[StepBatch]):
    dataset: Any
    plan: BatchPlan
    collate: Collate
    process: int
    items: Sequence[int] | None

    def __len__(self) -> int:
        return self.plan.steps_per_epoch

    def __getitem__(self, key: tuple[int, int]) -> StepBatch:
        rows = self.plan.rows_of(*key)
        forwards = tuple(
            forward_of(self.dataset, mine, self.collate)
            for mine in self.plan.deal(rows)[self.process]
        )
        return StepBatch(forwards, sum(self.items[r] for r in rows) if self.items else len(rows))


def forward_of(dataset: Any, rows: Sequence[int], collate: Collate) -> Forward:
    """The forward pass of some rows; of none, one whose tokens have no loss."""
    if rows:
        return Forward(collate([dataset[row] for row in rows]), tuple(rows))
    first = dataset[0]
    silent = {"input_ids": first["input_ids"][:2], "labels": [IGNORED] * 2}
    return Forward(collate([silent]), ())


def in_pinned_memory(batch: StepBatch) -> StepBatch:
    """A batch whose tensors a GPU can fetch while the host goes on."""
    forwards = (replace(each, inputs=pinned(each.inputs)) for each in batch.forwards)
    return replace(batch, forwards=tuple(forwards))


def _only(batch: list[StepBatch]) -> StepBatch:
    return batch[0]
