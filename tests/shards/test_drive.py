"""Opening, attempting, looking and collecting apart, as jobs of a chain do."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from medtrain.shards import (
    Phase,
    ShardSet,
    UnsoundShardError,
    attempt_units,
    collect_only,
    missing_units,
    open_phase,
    run_here,
    shard_progress,
)
from medtrain.shards.drive import rows_finished, take_for_dead
from medtrain.shards.shard_files import ShardFiles

from .sets import QUIET, Rows, refuse, requests, square


def phase_in(directory: Path, work: Any = square, count: int = 20, shards: int = 4) -> Phase:
    shard_set = ShardSet(
        key="t",
        title="t",
        directory=directory,
        requests=requests(count),
        settings={"model": "m"},
        work=work,
        collected=directory / "collected.jsonl",
        batch_size=2,
        num_shards=shards,
    )
    return Phase("t", (shard_set,))


def stopping_after(rows: int) -> Callable[[Any], Rows]:
    def work(batches: Any) -> Rows:
        for number, pair in enumerate(square(batches)):
            if number == rows:
                raise KeyboardInterrupt
            yield pair

    return work


def test_tasks_and_a_collect_make_what_one_process_makes(tmp_path: Path) -> None:
    run_here(phase_in(tmp_path / "here", shards=1), QUIET)
    there = phase_in(tmp_path / "there")
    open_phase(there)
    assert missing_units(there) == [("t", shard) for shard in range(4)]
    attempt_units(there, [("t", 2), ("t", 0), ("t", 99), ("another", 0)], QUIET)
    assert missing_units(there) == [("t", 1), ("t", 3)]
    with pytest.raises(UnsoundShardError):
        collect_only(there, QUIET)
    assert not (tmp_path / "there" / "collected.jsonl").exists()
    attempt_units(there, missing_units(there), QUIET)
    summary = collect_only(there, QUIET)[0]
    assert (summary.rows, summary.errors, summary.tokens) == (20, 0, 60)
    collected = (tmp_path / "there" / "collected.jsonl").read_bytes()
    assert collected == (tmp_path / "here" / "collected.jsonl").read_bytes()


def test_tasks_keep_to_the_plan_that_stands(tmp_path: Path) -> None:
    """A task with another number of shards in its configuration must not lay it out anew."""
    open_phase(phase_in(tmp_path, shards=4))
    plan = (tmp_path / "plan.json").read_bytes()
    attempt_units(phase_in(tmp_path, shards=7), [("t", 0)], QUIET)
    assert (tmp_path / "plan.json").read_bytes() == plan
    assert len(missing_units(phase_in(tmp_path, shards=1))) == 3


def test_failed_rows_are_tried_again_by_whoever_opens_and_by_nobody_else(tmp_path: Path) -> None:
    def failing(batches: Any) -> Rows:
        for row_id, result in square(batches):
            yield row_id, {"error": "busy"} if row_id == "row-3" else result

    phase = phase_in(tmp_path, failing)
    run_here(phase, QUIET)
    attempt_units(phase_in(tmp_path, refuse), [("t", shard) for shard in range(4)], QUIET)
    assert missing_units(phase) == []
    open_phase(phase)
    assert len(missing_units(phase)) == 1
    assert run_here(phase_in(tmp_path), QUIET)[0].errors == 0


def test_rows_are_counted_by_receipts_and_journals(tmp_path: Path) -> None:
    phase = phase_in(tmp_path, stopping_after(3), shards=1)
    with pytest.raises(KeyboardInterrupt):
        run_here(phase, QUIET)
    assert rows_finished(phase) == 3
    run_here(phase_in(tmp_path, shards=1), QUIET)
    assert rows_finished(phase) == 20


def test_an_attempt_whose_job_is_over_is_taken_for_dead_at_once(tmp_path: Path) -> None:
    phase = phase_in(tmp_path, stopping_after(3), shards=1)
    with pytest.raises(KeyboardInterrupt):
        run_here(phase, QUIET)
    attempt = next(ShardFiles(tmp_path, 0).attempts())
    mark = attempt.end_mark()
    assert mark is not None
    mark.rename(attempt.heartbeat)  # as a kill leaves it
    assert time.time() - attempt.heartbeat.stat().st_mtime < 60
    take_for_dead(phase, [("t", 0), ("t", 5), ("another", 0)])
    assert attempt.heartbeat.stat().st_mtime == 0


def test_a_set_is_released_when_no_more_of_it_is_computed_here(tmp_path: Path) -> None:
    released: list[str] = []
    first, second = (
        replace(phase_in(tmp_path / key).sets[0], key=key, release=lambda k=key: released.append(k))
        for key in ("a", "b")
    )

    def work(batches: Any) -> Rows:
        assert released == ["a"], "the first model is still in memory"
        yield from square(batches)

    run_here(Phase("two", (first, replace(second, work=work))), QUIET)
    assert released == ["a", "b"]
    assert shard_progress(tmp_path / "b").done == 20
