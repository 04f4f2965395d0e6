"""What earlier attempts at a shard did: the rows they finished, and how they ended.

attempt directories → marks, heartbeats and journals → one record an attempt, in the order in which
they began. A row counts as finished if it was journaled for the same request hash.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from medtrain.shards.journal import read_journal
from medtrain.shards.liveness import AttemptMark, beat_age_s
from medtrain.shards.plan import Plan
from medtrain.shards.shard_files import AttemptFiles, ShardFiles

Result = dict[str, Any]


class Pulled(NamedTuple):
    """Rows that were begun together."""

    rows: tuple[str, ...]
    alone: bool
    """Nothing else was in flight."""


@dataclass(slots=True)
class PastAttempt:
    """An earlier or concurrent attempt at the shard."""

    name: str
    began: float
    """By the clock of the file system, like the next one."""
    last_seen: float
    died: bool
    """It has neither ended nor is it alive."""
    pulled: list[Pulled] = field(default_factory=list)
    results: dict[str, Result] = field(default_factory=dict)
    """Of rows of this plan, for the same request."""


def look_back(
    files: ShardFiles,
    hashes: Mapping[str, str],
    *,
    me: AttemptMark | None = None,
) -> list[PastAttempt]:
    """Every other attempt at a shard, the first one first.

    Args:
        files: the shard.
        hashes: row id → request hash of its rows; other records are left out.
        me: the attempt that asks, whose heartbeat stands: by that file's time the age of the
            others' is told, since clocks of hosts differ. Without one nobody is taken for dead.
    """
    now = files.attempt(me.attempt).heartbeat.stat().st_mtime if me is not None else 0.0
    found = [
        _past_attempt(attempt, hashes, me, now)
        for attempt in files.attempts()
        if me is None or attempt.name != me.attempt
    ]
    return sorted(found, key=lambda past: (past.began, past.name))


def _past_attempt(
    files: AttemptFiles,
    hashes: Mapping[str, str],
    me: AttemptMark | None,
    now: float,
) -> PastAttempt:
    forgiven = files.forgiven.exists()
    mark = AttemptMark.read(files)
    unended = mark is not None and files.end_mark() is None and files.heartbeat.exists()
    died = unended and me is not None and not forgiven
    if died and mark is not None:
        died = not mark.is_alive(beat_age_s(files, now), me)
    last_seen = max(map(_changed_at, (files.heartbeat, files.journal)))
    past = PastAttempt(files.name, _changed_at(files.mark), last_seen, died)
    for record in _records(files):
        if "pulled" in record:
            past.pulled.append(Pulled(tuple(record["pulled"]), bool(record.get("alone"))))
            continue
        row, result = record["id"], record["result"]
        taken_back = forgiven and result.get("quarantined")
        if record["request"] == hashes.get(row) and not taken_back:
            past.results[row] = result
    return past


def _changed_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _records(files: AttemptFiles) -> Iterable[dict[str, Any]]:
    try:
        yield from read_journal(files.journal)
    except FileNotFoundError:
        return


def finished(past: Iterable[PastAttempt]) -> dict[str, Result]:
    """The result of every row that any attempt finished: the first success, or else the last
    verdict on it."""
    results: dict[str, Result] = {}
    for attempt in past:
        for row, result in attempt.results.items():
            if "error" in results.get(row, {"error": ""}):
                results[row] = result
    return results


def finished_rows(plan: Plan, shard: int, files: ShardFiles) -> dict[str, Result]:
    """Results of this shard's rows that attempts journaled for the same requests."""
    return finished(look_back(files, plan.hashes(shard)))


def forgive(files: ShardFiles) -> None:
    """Let no death so far count: rows that were given up on are tried again."""
    for attempt in files.attempts():
        attempt.forgiven.touch()
