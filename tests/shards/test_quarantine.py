"""A row that kills its process each time is found, given up on and reported; no other one is."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medtrain.shards import make_plan
from medtrain.shards.attempt import Result, ShardFiles, distrust, forgive, run_attempt
from medtrain.shards.carry import settle_plan
from medtrain.shards.history import PastAttempt, Pulled
from medtrain.shards.liveness import AttemptMark, Beat
from medtrain.shards.plan import Plan
from medtrain.shards.quarantine import suspicion

from .processes import POISON, start
from .sets import requests


def results_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "collected.jsonl").open("rb")]


def starts_until_done(directory: Path, poison: list[str], count: int, **options: Any) -> int:
    for number in range(1, 30):
        process = start(directory, count, before=POISON.format(rows=poison), **options)
        if process.wait() == 0:
            return number
        assert process.returncode == -signal.SIGKILL
    raise AssertionError("the poison row is never given up on")


@pytest.mark.parametrize("read_ahead", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_poison_row_is_given_up_on_and_no_other(
    tmp_path: Path, batch_size: int, read_ahead: bool
) -> None:
    options = {"batch_size": batch_size, "read_ahead": read_ahead}
    # Once with progress, twice stuck, perhaps once alone, and then it is done.
    assert starts_until_done(tmp_path, ["row-8"], 12, **options) <= 5
    rows = results_of(tmp_path)
    assert [row["id"] for row in rows] == [request.id for request in requests(12)]
    failed = [row for row in rows if "error" in row]
    assert [row["id"] for row in failed] == ["row-8"]
    assert failed[0]["quarantined"] is True
    assert "died" in failed[0]["error"]
    receipt = json.loads((tmp_path / "shards/00000/done.json").read_text())
    assert (receipt["quarantined"], receipt["errors"]) == (1, 1)


def test_two_poison_rows_of_one_batch_are_both_found(tmp_path: Path) -> None:
    starts_until_done(tmp_path, ["row-2", "row-5"], 8, batch_size=8)
    failed = [row["id"] for row in results_of(tmp_path) if "error" in row]
    assert failed == ["row-2", "row-5"]


def test_a_row_that_was_given_up_on_stays_so_until_it_is_forgiven(tmp_path: Path) -> None:
    starts_until_done(tmp_path, ["row-3"], 5)
    computed: list[str] = []

    def note(batches: Iterable[list[str]]) -> Iterator[tuple[str, Result]]:
        for batch in batches:
            computed.extend(batch)
            yield from ((row, {"y": 1}) for row in batch)

    def attempt_all(num_shards: int) -> int:
        """Every shard anew; the number of failed rows."""
        made = make_plan(requests(5), {"model": "m"}, num_shards=num_shards)
        plan = settle_plan(tmp_path, made)
        errors = 0
        for shard in range(num_shards):
            files = ShardFiles(tmp_path, shard)
            distrust(files)
            run_attempt(plan, shard, files, note, lambda result: None)
            errors += json.loads(files.done.read_text())["errors"]
        return errors

    assert (attempt_all(1), computed) == (1, [])
    assert (attempt_all(2), computed) == (1, [])
    for shard in range(2):
        forgive(ShardFiles(tmp_path, shard))
    assert (attempt_all(3), computed) == (0, ["row-3"])


@dataclass
class Poisoned:
    """A shard whose earlier attempts are faked: every one leaves what a killed process leaves."""

    directory: Path
    plan: Plan

    @property
    def files(self) -> ShardFiles:
        return ShardFiles(self.directory, 0)

    def attempt_that_stops_in(self, row: str, how: type[BaseException]) -> None:
        def work(batches: Iterable[list[str]]) -> Iterator[tuple[str, Result]]:
            for batch in batches:
                if row in batch:
                    raise how("stop")
                for done in batch:
                    yield done, {"y": 1}

        with pytest.raises(how):
            run_attempt(self.plan, 0, self.files, work, lambda result: None)

    def forget_the_end(self, **changes: Any) -> None:
        """The newest attempt looks as if its process had been killed."""
        newest = max(self.files.attempts(), key=lambda files: files.mark.stat().st_mtime_ns)
        ended = newest.end_mark()
        assert ended is not None
        ended.rename(newest.heartbeat)
        mark = AttemptMark.read(newest)
        assert mark is not None
        fields = {name: getattr(mark, name) for name in mark.__slots__}
        AttemptMark(**{**fields, **changes}).write(newest)

    def finish(self) -> dict[str, Result]:
        """One more attempt, in which nothing dies."""

        def work(batches: Iterable[list[str]]) -> Iterator[tuple[str, Result]]:
            for batch in batches:
                yield from ((row, {"y": 1}) for row in batch)

        run_attempt(self.plan, 0, self.files, work, lambda result: None)
        receipt = json.loads(self.files.done.read_text())
        with self.files.attempt(receipt["attempt"]).rows.open("rb") as rows:
            return {row["id"]: row for row in map(json.loads, rows)}


GONE = {"process_started": "0"}
"""No process of that number that began at that time: it died."""
ELSEWHERE = {"process_space": "another host"}


@pytest.fixture
def poisoned(tmp_path: Path) -> Poisoned:
    return Poisoned(tmp_path, make_plan(requests(3), {}))


def last_row(poisoned: Poisoned) -> str:
    return list(poisoned.plan.hashes(0))[-1]


@pytest.mark.parametrize("how", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_an_attempt_that_ends_blames_nobody(poisoned: Poisoned, how: type[BaseException]) -> None:
    for _ in range(6):
        poisoned.attempt_that_stops_in(last_row(poisoned), how)
    assert not any("error" in result for result in poisoned.finish().values())


def test_deaths_count_and_lives_do_not(poisoned: Poisoned) -> None:
    row = last_row(poisoned)
    for _ in range(3):
        poisoned.attempt_that_stops_in(row, KeyboardInterrupt)
        poisoned.forget_the_end()  # its process, this one, is alive
    for _ in range(3):
        poisoned.attempt_that_stops_in(row, KeyboardInterrupt)
        poisoned.forget_the_end(**ELSEWHERE)  # and here its heartbeat is fresh
    assert not any("error" in result for result in poisoned.finish().values())


def test_a_silent_attempt_elsewhere_has_died(poisoned: Poisoned) -> None:
    row = last_row(poisoned)
    for _ in range(3):
        poisoned.attempt_that_stops_in(row, KeyboardInterrupt)
        poisoned.forget_the_end(**ELSEWHERE)
        for attempt in poisoned.files.attempts():
            if attempt.heartbeat.exists():
                old = attempt.heartbeat.stat().st_mtime - 3600
                os.utime(attempt.heartbeat, (old, old))
    assert [r for r, result in poisoned.finish().items() if "error" in result] == [row]


def test_an_earlier_start_of_the_same_job_is_dead_for_sure(
    poisoned: Poisoned, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = last_row(poisoned)
    monkeypatch.setenv("SLURM_JOB_ID", "33")
    for restart in range(3):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        poisoned.attempt_that_stops_in(row, KeyboardInterrupt)
        poisoned.forget_the_end(**ELSEWHERE)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    assert [r for r, result in poisoned.finish().items() if "error" in result] == [row]


def died(pulled: list[list[str]], finished: list[str], *, alone: bool = False) -> PastAttempt:
    marks = [Pulled(tuple(rows), alone) for rows in pulled]
    return PastAttempt("a", 1.0, 1.0, True, marks, {row: {"y": 1} for row in finished})


def test_rows_in_flight_together_are_told_apart_one_by_one() -> None:
    stuck = died([["a"], ["b"], ["c"]], [])
    assert suspicion([stuck]) == (frozenset(), {})
    assert suspicion([stuck, stuck]) == (frozenset("abc"), {})
    lone = died([["a"], ["b"]], ["a"], alone=True)
    assert suspicion([stuck, stuck, lone]) == (frozenset("c"), {"b": 3})


def test_an_engine_that_finishes_others_meanwhile_does_not_hide_a_poison_row() -> None:
    attempts = [died([["p"], [f"{i}"]], [f"{i}"]) for i in range(4)]
    assert suspicion(attempts[:3]) == (frozenset(), {})
    assert suspicion(attempts).alone == {"p"}


def test_writers_that_die_together_are_one_death() -> None:
    first, twin = died([["a"]], []), died([["a"]], [])
    first.last_seen, twin.began = 9.0, 2.0
    assert suspicion([first, twin]).given_up == {}
    twin.began = 10.0
    assert suspicion([first, twin]).given_up == {"a": 2}


@given(st.lists(st.tuples(st.sets(st.integers(0, 5)), st.sets(st.integers(0, 5)), st.booleans())))
@settings(max_examples=200)
def test_no_row_is_blamed_for_fewer_than_two_deaths(history: list[Any]) -> None:
    past = [
        PastAttempt(
            "a",
            1.0,
            1.0,
            has_died,
            [Pulled((str(row),), False) for row in sorted(pulled)],
            {str(row): {"y": 1} for row in pulled & finished},
        )
        for pulled, finished, has_died in history
    ]
    verdict = suspicion(past)
    done = {row for attempt in past for row in attempt.results}
    for row in verdict.alone | verdict.given_up.keys():
        begun = [a for a in past if a.died and any(row in p.rows for p in a.pulled)]
        assert row not in done
        assert len(begun) >= 2
    assert not verdict.alone & verdict.given_up.keys()


def test_a_beat_that_is_torn_is_no_beat(tmp_path: Path) -> None:
    (tmp_path / "heartbeat").write_text('{"rows": 3')
    assert Beat.read(tmp_path / "heartbeat") is None
