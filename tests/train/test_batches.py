"""The plan of a training's steps: every row once, the same steps for any number of processes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medtrain.train.batches import BatchPlan, Dealt

LIMIT = 64


def plan_of(lengths: list[int], **options: Any) -> BatchPlan:
    given = {"rows_a_step": 8, "processes": 1, "max_rows": 2, "max_tokens": LIMIT, "seed": 0}
    return BatchPlan(lengths=lengths, **{**given, **options})


def all_rows(dealt: Dealt) -> list[int]:
    return [row for forwards in dealt for rows in forwards for row in rows]


def tokens(plan: BatchPlan, rows: list[int]) -> int:
    return sum(plan.lengths[row] for row in rows)


LENGTHS = st.lists(st.integers(1, LIMIT), min_size=1, max_size=60)
PROCESSES = st.sampled_from([1, 2, 4, 8])


@st.composite
def plans(draw: st.DrawFn, **fixed: Any) -> BatchPlan:
    """Steps as a training makes them: as many rows for each process, but for the last."""
    processes = fixed.pop("processes", None) or draw(PROCESSES)
    each = draw(st.integers(1, 12))
    options = {
        "processes": processes,
        "rows_a_step": each * processes,
        "max_rows": draw(st.integers(1, each)),
        "max_tokens": draw(st.sampled_from([None, LIMIT, 3 * LIMIT])),
        "seed": draw(st.integers(0, 99)),
        "even": draw(st.booleans()),
        **fixed,
    }
    return plan_of(draw(LENGTHS), **options)


@given(plans(even=False), st.integers(0, 3))
def test_an_epoch_has_every_row_once(plan: BatchPlan, epoch: int) -> None:
    seen: list[int] = []
    for step in range(plan.steps_per_epoch):
        rows = plan.rows_of(epoch, step)
        dealt = all_rows(plan.deal(rows))
        assert sorted(dealt) == sorted(rows)
        seen += dealt
    assert sorted(seen) == list(range(len(plan.lengths)))


@given(plans(even=True), st.integers(0, 3))
def test_an_even_epoch_is_filled_up_from_its_beginning(plan: BatchPlan, epoch: int) -> None:
    steps = [plan.rows_of(epoch, step) for step in range(plan.steps_per_epoch)]
    assert {len(rows) for rows in steps} == {plan.rows_a_step}
    seen = Counter(row for rows in steps for row in rows)
    assert set(seen) == set(range(len(plan.lengths)))
    assert max(seen.values()) - min(seen.values()) <= 1
    twice = plan.rows_a_step * len(steps) - len(plan.lengths)
    order = plan.order(epoch)
    assert [row for rows in steps for row in rows] == (order * (1 + twice))[: len(order) + twice]


@given(LENGTHS, st.integers(0, 99), st.integers(0, 2), st.booleans())
def test_the_rows_of_a_step_do_not_depend_on_the_processes(
    lengths: list[int], seed: int, epoch: int, even: bool
) -> None:
    one, *others = [
        plan_of(lengths, seed=seed, processes=processes, even=even) for processes in (1, 2, 4, 8)
    ]
    for step in range(one.steps_per_epoch):
        rows = one.rows_of(epoch, step)
        for other in others:
            assert other.rows_of(epoch, step) == rows
            assert sorted(all_rows(other.deal(rows))) == sorted(all_rows(one.deal(rows)))


@given(plans())
def test_every_process_takes_part_in_as_many_forward_passes(plan: BatchPlan) -> None:
    for step in range(plan.steps_per_epoch):
        rows = plan.rows_of(0, step)
        dealt = plan.deal(rows)
        assert len(dealt) == plan.processes
        assert len({len(forwards) for forwards in dealt}) == 1
        idle = [forwards for forwards in dealt if not any(forwards)]
        assert len(idle) == max(0, plan.processes - len(rows))


@given(plans())
def test_no_forward_pass_is_too_large(plan: BatchPlan) -> None:
    for step in range(plan.steps_per_epoch):
        for forwards in plan.deal(plan.rows_of(0, step)):
            for rows in forwards:
                if plan.max_tokens is None:
                    assert len(rows) <= plan.max_rows
                else:
                    assert tokens(plan, rows) <= plan.max_tokens


@given(plans(even=True))
def test_even_forward_passes_have_equally_many_rows(plan: BatchPlan) -> None:
    """Their losses are means over rows, and are added up without weights."""
    for step in range(plan.steps_per_epoch):
        dealt = plan.deal(plan.rows_of(0, step))
        assert len({len(rows) for forwards in dealt for rows in forwards}) == 1


@given(plans())
def test_a_plan_is_the_same_every_time(plan: BatchPlan) -> None:
    again = BatchPlan(**vars(plan))
    rows = plan.rows_of(1, 0)
    assert again.rows_of(1, 0) == rows
    assert again.deal(rows) == plan.deal(rows)


@pytest.mark.parametrize("what", [{"seed": 1}, {"epoch": 1}])
def test_epochs_and_seeds_have_orders_of_their_own(what: dict[str, int]) -> None:
    lengths = [5] * 40
    order = plan_of(lengths).order(0)
    other = plan_of(lengths, seed=what.get("seed", 0)).order(what.get("epoch", 0))
    assert sorted(other) == sorted(order)
    assert other != order


@given(plans(even=False, processes=1, max_tokens=LIMIT))
def test_packing_needs_few_forward_passes(plan: BatchPlan) -> None:
    """No two forward passes of a best fit could have been one."""
    for step in range(plan.steps_per_epoch):
        rows = plan.rows_of(0, step)
        forwards = plan.deal(rows)[0]
        fewest = -(-tokens(plan, rows) // LIMIT)
        long = sum(2 * plan.lengths[row] > LIMIT for row in rows)
        assert len(forwards) <= len(rows)
        assert max(fewest, long) <= len(forwards)
        assert len(forwards) <= 2 * tokens(plan, rows) / LIMIT + 1


def test_packing_finds_the_fit_and_evens_it_out() -> None:
    plan = plan_of([60, 4, 50, 14, 40, 24, 34, 30], rows_a_step=8)
    assert [tokens(plan, rows) for rows in plan.deal(range(8))[0]] == [64, 64, 64, 64]
    level = plan_of([40, 10, 10, 10, 10], rows_a_step=5)
    assert sorted(tokens(level, rows) for rows in level.deal(range(5))[0]) == [40, 40]


def test_an_even_step_takes_as_few_forward_passes_as_its_tokens_allow() -> None:
    """Eight pairs of 16 tokens fit four at a time, whatever batch_size says."""
    plan = plan_of([16] * 8, even=True, max_rows=1)
    assert [len(rows) for rows in plan.deal(range(8))[0]] == [4, 4]
    two = plan_of([16] * 8, even=True, max_rows=1, processes=2)
    assert [[len(rows) for rows in forwards] for forwards in two.deal(range(8))] == [[4], [4]]


@given(plans())
def test_rows_that_cannot_be_dealt_evenly_are_the_shortest(plan: BatchPlan) -> None:
    rows = range(len(plan.lengths))
    shared, alone = plan.shared_and_alone(rows)
    assert sorted(shared + alone) == list(rows)
    assert len(shared) % plan.processes == 0
    assert len(alone) < plan.processes
    if shared and alone:
        assert max(plan.lengths[i] for i in alone) <= min(plan.lengths[i] for i in shared)


@given(LENGTHS.filter(lambda lengths: len(lengths) > 1))
def test_padded_rows_have_neighbours_of_their_length(lengths: list[int]) -> None:
    plan = plan_of(lengths, rows_a_step=len(lengths), max_tokens=None, max_rows=2)
    forwards = plan.deal(range(len(lengths)))[0]
    dealt = [plan.lengths[row] for rows in forwards for row in rows]
    assert dealt == sorted(lengths, reverse=True)
