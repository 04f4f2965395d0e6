"""Rows, settings and the number of processes → what a trainer is fed with (`Fed`).

SFT: rows packed into forward passes of at most `batch_size * max_length` tokens, losses weighted by
tokens. Preferences: as many pairs in every forward pass, since their loss is a mean over pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from medtrain.config import TrainingConfig
from medtrain.errors import DataError
from medtrain.train.batches import BatchPlan
from medtrain.train.checkpoints import Plan
from medtrain.train.evaluating import Fed
from medtrain.train.loader import Collate, preference_batch, supervised_batch
from medtrain.train.rows import Part, Rows

Reference = Mapping[str, tuple[float, float]]
"""Pair id → the reference's log probabilities of the chosen and the rejected answer, in nats."""


def feed_supervised(
    rows: Rows, section: TrainingConfig, plan: Plan, *, seed: int, pad_token_id: int, packed: bool
) -> Fed:
    """What SFT is fed with; `seed` orders the rows."""
    validation = rows.validation
    return Fed(
        dataset=rows.train.dataset,
        validation=validation.dataset if validation else None,
        plan=_steps(rows.train, section, plan, seed, packed=packed),
        collate=supervised_batch(pad_token_id, packed=packed),
        ids=rows.train.ids,
        items=rows.train.items,
        eval_plan=_evaluation(validation, section, plan, packed=packed) if validation else None,
        eval_items=validation.items if validation else None,
    )


def feed_preferences(
    rows: Rows,
    section: TrainingConfig,
    plan: Plan,
    reference: Reference | None,
    *,
    seed: int,
    collate: Collate,
    packed: bool,
) -> Fed:
    """What a preference trainer is fed with.

    Args:
        rows: pairs.
        section: the stage's configuration.
        plan: its steps.
        reference: sums of the pairs, or None for losses without one.
        seed: orders the pairs.
        collate: makes the loss's inputs of pairs.
        packed: whether rows are computed without padding.

    Raises:
        DataError: the reference lacks a pair.
    """
    validation = rows.validation
    return Fed(
        dataset=_with_reference(rows.train, reference),
        validation=_with_reference(validation, reference) if validation else None,
        plan=_steps(rows.train, section, plan, seed, packed=packed, even=True),
        collate=collate,
        ids=rows.train.ids,
        items=None,
        # Each process must have as many pairs of a forward pass, for TRL gathers their rewards.
        eval_plan=_evaluation(validation, section, plan, packed=False) if validation else None,
    )


def pair_collate(pad_token_id: int, *, packed: bool) -> Collate:
    """For DPO's loss, and others that take chosen and rejected answers together."""
    return preference_batch(pad_token_id, packed=packed)


def _steps(
    part: Part,
    section: TrainingConfig,
    plan: Plan,
    seed: int,
    *,
    packed: bool,
    even: bool = False,
) -> BatchPlan:
    sides = 2 if even else 1
    return BatchPlan(
        lengths=part.lengths,
        rows_a_step=plan.rows_a_step,
        processes=plan.processes,
        max_rows=section.batch_size,
        max_tokens=section.batch_size * section.max_length * sides if packed else None,
        seed=seed,
        even=even,
    )


def _evaluation(part: Part, section: TrainingConfig, plan: Plan, *, packed: bool) -> BatchPlan:
    return BatchPlan(
        lengths=part.lengths,
        rows_a_step=len(part),
        processes=plan.processes,
        max_rows=section.eval_batch_size,
        max_tokens=section.eval_batch_size * section.max_length if packed else None,
        seed=0,
    )


def _with_reference(part: Part, reference: Reference | None) -> Any:
    if reference is None:
        return part.dataset
    columns = ("ref_chosen_logps", "ref_rejected_logps")
    return with_sums(part.dataset, part.ids, reference, columns)


def with_sums(
    dataset: Any, ids: Sequence[str], reference: Reference, columns: tuple[str, str]
) -> Any:
    """A dataset with the reference's sums as two more columns.

    Args:
        dataset: of one row for each of `ids`.
        ids: that `reference` knows the sums by.
        reference: sums of the first and of the second answer.
        columns: their names.

    Raises:
        DataError: the reference lacks a pair.
    """
    missing = [row for row in ids if row not in reference]
    if missing:
        raise DataError(
            f"The reference has no log probabilities of {len(missing)} of {len(ids)} pairs, such "
            f"as {missing[0]}",
            fix="Compute it again: medtrain run CONFIG --only reference --force reference.",
        )
    for side, column in enumerate(columns):
        dataset = dataset.add_column(column, [reference[row][side] for row in ids])
    return dataset
