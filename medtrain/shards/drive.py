"""Bringing a phase to its collected files in this process, and the steps that others do apart.

open_phase     settle the plans; one process does it, before the tasks of an array
attempt_units  one attempt at each of some shards: what a task does
run_here       open, attempt everything, collect; a shard whose file turns out to be damaged is
               computed again from its journals, once
missing_units  what a repair has to compute
rows_finished  how far a phase is, to the row
take_for_dead  who knows that the jobs of some shards are over says so
collect_only   collect what is there, or say what is missing
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from medtrain.console import Console
from medtrain.shards.attempt import (
    Result,
    ShardFiles,
    distrust,
    finished_rows,
    receipt_that_holds,
    run_attempt,
    sound_receipt,
)
from medtrain.shards.carry import settle_plan
from medtrain.shards.collect import Collected, UnsoundShardError, already_collected, collect
from medtrain.shards.costs import measured_costs
from medtrain.shards.plan import Plan, make_plan
from medtrain.shards.shard_set import Phase, ShardSet, ShardSummary, Unit

OnRow = Callable[[Result], None]


def run_here(phase: Phase, console: Console) -> list[ShardSummary]:
    """Compute every row of a phase that is not finished, and collect.

    Raises:
        DataError: a plan on disk is damaged, or two rows have one id.
    """
    return [_bring(shard_set, console) for shard_set in phase.sets]


@dataclass(frozen=True)
class CollectOnly:
    """The drive that computes nothing: it collects a phase whose shards others have finished.

    Raises:
        UnsoundShardError: shards are missing or damaged.
    """

    patience_s: float = 0.0
    """How long to look again for what seems to be absent."""

    def __call__(self, phase: Phase, console: Console) -> list[ShardSummary]:
        """Collect every set."""
        return [_collect(s, standing_plan(s), self.patience_s) for s in phase.sets]


collect_only = CollectOnly()


def open_phase(phase: Phase) -> None:
    """Settle every set's plan; failed rows of an earlier try are tried again, the others stand."""
    for shard_set in phase.sets:
        _open(shard_set)


def attempt_units(phase: Phase, units: Sequence[Unit], console: Console) -> None:
    """One attempt at each of some shards; a shard that the plan does not have is finished."""
    plans: dict[str, Plan] = {}
    for key, shard in units:
        shard_set = phase.by_key(key)
        if shard_set is None:
            continue
        if key not in plans:
            plans[key] = standing_plan(shard_set)
        plan = plans[key]
        if shard < len(plan.shards):
            rows = len(plan.positions(shard))
            with _progress(console, f"{shard_set.title}, shard {shard}", rows) as on_row:
                _attempt(shard_set, plan, [shard], on_row)


def missing_units(phase: Phase) -> list[Unit]:
    """The shards of a phase that have no sound receipt."""
    return [
        (shard_set.key, shard)
        for shard_set, plan in ((s, standing_plan(s)) for s in phase.sets)
        for shard in range(len(plan.shards))
        if receipt_that_holds(plan, shard, ShardFiles(shard_set.directory, shard)) is None
    ]


def rows_finished(phase: Phase) -> int:
    """Rows of a phase that have a result, by receipts and journals: of an attempt that was killed,
    the heartbeat may be behind by all the rows it finished."""
    return sum(
        len(plan.positions(shard))
        if receipt_that_holds(plan, shard, files := ShardFiles(shard_set.directory, shard))
        else len(finished_rows(plan, shard, files))
        for shard_set, plan in ((s, standing_plan(s)) for s in phase.sets)
        for shard in range(len(plan.shards))
    )


def take_for_dead(phase: Phase, units: Iterable[Unit]) -> None:
    """Have attempts that never said how they ended count as dead, and not only when a minute has
    passed without a sign of life. One that lives all the same gives its next sign soon."""
    for key, shard in units:
        shard_set = phase.by_key(key)
        attempts = ShardFiles(shard_set.directory, shard).attempts() if shard_set else ()
        for attempt in attempts:
            with suppress(FileNotFoundError):
                os.utime(attempt.heartbeat, (0, 0))


def standing_plan(shard_set: ShardSet) -> Plan:
    """The plan on disk, however it was laid out; where there is none, this process's own."""
    return settle_plan(shard_set.directory, _plan(shard_set), adopt=True)


def _plan(shard_set: ShardSet) -> Plan:
    costs = measured_costs(shard_set.measured_in) if shard_set.measured_in else None
    return make_plan(
        shard_set.requests,
        shard_set.settings,
        batch_size=shard_set.batch_size,
        num_shards=shard_set.num_shards,
        weights=costs.weights(shard_set.requests) if costs else None,
    )


def _open(shard_set: ShardSet) -> Plan:
    """Settle the plan; whoever starts a stage again wants its failed rows tried again."""
    plan = settle_plan(shard_set.directory, _plan(shard_set))
    for shard in range(len(plan.shards)):
        files = ShardFiles(shard_set.directory, shard)
        receipt = sound_receipt(plan, shard, files)
        # Rows that killed their processes stay given up on.
        if receipt is not None and receipt["errors"] > receipt["quarantined"]:
            distrust(files)
    return plan


def _bring(shard_set: ShardSet, console: Console) -> ShardSummary:
    before = already_collected(_plan(shard_set), shard_set.directory, shard_set.collected)
    if before is not None and not before.errors:
        return _summary(before)
    plan = _open(shard_set)
    everything = range(len(plan.shards))
    try:
        with _progress(console, shard_set.title, len(shard_set.requests)) as on_row:
            _attempt(shard_set, plan, everything, on_row)
        try:
            return _collect(shard_set, plan)
        except UnsoundShardError as error:
            console.warn("shard_unsound", f"{error.message}; computing what is missing again")
        _attempt(shard_set, plan, everything, lambda result: None)
        return _collect(shard_set, plan)
    finally:
        shard_set.release()


@contextmanager
def _progress(console: Console, title: str, total: int) -> Iterator[OnRow]:
    failed = 0
    with console.progress(title, total=total) as task:

        def on_row(result: Result) -> None:
            nonlocal failed
            failed += "error" in result
            task.advance(**({"failed": failed} if failed else {}))

        yield on_row


def _attempt(shard_set: ShardSet, plan: Plan, shards: Iterable[int], on_row: OnRow) -> None:
    by_id = {request.id: request for request in shard_set.requests}

    def work(batches: Iterable[list[str]]) -> Iterator[tuple[str, Result]]:
        return shard_set.work([by_id[row] for row in batch] for batch in batches)

    for shard in shards:
        run_attempt(plan, shard, ShardFiles(shard_set.directory, shard), work, on_row)


def _collect(shard_set: ShardSet, plan: Plan, patience_s: float = 0.0) -> ShardSummary:
    return _summary(collect(plan, shard_set.directory, shard_set.collected, patience_s=patience_s))


def _summary(collected: Collected) -> ShardSummary:
    return ShardSummary(collected.rows, collected.errors, collected.tokens, collected.seconds)
