"""How far a sharded stage is, from the files alone; looking changes nothing.

plan → of finished shards the receipts, of others their attempts' heartbeats → one record. No
journal is read, so that thousands of shards take less than a second; what an attempt has done since
its last heartbeat is seen a few seconds later.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from medtrain.errors import DataError
from medtrain.shards.journal import read_journal
from medtrain.shards.liveness import AttemptMark, Beat
from medtrain.shards.plan import Layout, Plan
from medtrain.shards.receipts import receipt_that_holds
from medtrain.shards.shard_files import AttemptFiles, ShardFiles, plan_path

RECENT_S = 600.0
"""The rate is of this many last seconds."""


class OpenAttempt(NamedTuple):
    """An attempt that has not ended, as far as the files tell: it runs, or it died."""

    shard: int
    attempt: str
    job: str
    host: str
    alive: bool
    """Its process was seen, or its heartbeat is fresh."""
    rows: int
    """Finished rows of the shard."""
    total: int
    started_at: float
    beat_age_s: float
    row_age_s: float | None
    """Since the last journaled row; None before the first one."""
    gpus: int


class Progress(NamedTuple):
    """Rows and shards finished, and what it took."""

    done: int
    """Rows finished."""
    total: int
    shards_done: int = 0
    shards_total: int = 0
    errors: int = 0
    """Of the finished rows, quarantined ones included."""
    quarantined: int = 0
    """In finished shards."""
    seconds: float = 0.0
    """Of finished shards."""
    tokens: int = 0
    """Of finished shards."""
    rows_per_s: float = 0.0
    """Over the last minutes."""
    gpu_seconds: float = 0.0
    """Of all attempts, from their start to their end or last sign of life."""
    gpu_seconds_wasted: float = 0.0
    """Of attempts that did not finish: what came after their last row."""
    open_attempts: tuple[OpenAttempt, ...] = ()
    """Of shards that are not done."""


def shard_progress(directory: Path) -> Progress:
    """Look at every shard of a stage's directory."""
    try:
        layout = Plan.read(plan_path(directory))
    except (FileNotFoundError, DataError):
        return Progress(0, 0)
    tally = _Tally(time.time())
    for shard in range(len(layout.shards)):
        files = ShardFiles(directory, shard)
        receipt = receipt_that_holds(layout, shard, files)
        if receipt is not None:
            tally.add_done(files, receipt)
        else:
            tally.add_open(files, layout)
    return Progress(
        done=tally.rows,
        total=layout.num_rows,
        shards_done=tally.shards,
        shards_total=len(layout.shards),
        errors=tally.errors,
        quarantined=tally.quarantined,
        seconds=round(tally.seconds, 3),
        tokens=tally.tokens,
        rows_per_s=tally.rows_per_s(),
        gpu_seconds=tally.gpu_seconds,
        gpu_seconds_wasted=tally.gpu_seconds_wasted,
        open_attempts=tuple(tally.open_attempts),
    )


@dataclass(slots=True)
class _Tally:
    """Sums over shards."""

    now: float
    rows: int = 0
    shards: int = 0
    errors: int = 0
    quarantined: int = 0
    seconds: float = 0.0
    tokens: int = 0
    recent_rows: float = 0.0
    recent_since: float = float("inf")
    gpu_seconds: float = 0.0
    gpu_seconds_wasted: float = 0.0
    open_attempts: list[OpenAttempt] = field(default_factory=list)

    def add_done(self, files: ShardFiles, receipt: dict[str, Any]) -> None:
        """A shard whose receipt holds."""
        self.shards += 1
        self.rows += receipt["rows"]
        self.errors += receipt["errors"]
        self.quarantined += receipt["quarantined"]
        self.seconds += receipt["seconds"]
        self.tokens += receipt["tokens"]
        ended, started = receipt["ended_at"], receipt["ended_at"] - receipt["seconds"]
        self._add_recent(receipt["computed"]["rows"], started, ended)
        self.gpu_seconds += receipt["gpus"] * (ended - receipt["started_at"])
        if receipt["attempts"] > 1:
            for attempt in files.attempts():
                if attempt.name != receipt["attempt"]:
                    self._add_attempt(attempt)

    def add_open(self, files: ShardFiles, layout: Layout) -> None:
        """A shard without a receipt: the attempt that is furthest tells how far it is."""
        furthest, total = Beat(), len(layout.positions(files.shard))
        for attempt in files.attempts():
            beat, age_s, mark = self._add_attempt(attempt)
            if mark is None or mark.plan_id != layout.plan_id:
                continue
            if attempt.end_mark() is None:
                self.open_attempts.append(_open_attempt(files.shard, mark, beat, age_s, total))
            if beat.rows > furthest.rows:
                furthest = beat
        self.rows += furthest.rows
        self.errors += furthest.errors

    def _add_attempt(self, files: AttemptFiles) -> tuple[Beat, float, AttemptMark | None]:
        """Add what an attempt did and took; its last beat, the age of that, and its mark."""
        mark, ended = AttemptMark.read(files), files.end_mark()
        beat, age_s = _beat(files, ended or files.heartbeat, self.now)
        if mark is not None:
            self._add_recent(beat.new, *_working_time(beat, age_s, self.now))
            self.gpu_seconds += mark.gpus * max(0.0, beat.at - mark.started_at)
            whole = ended is not None and ended in (files.ended("finished"), files.ended("carried"))
            if not whole and (ended is not None or not mark.is_alive(age_s)):
                idle_since = beat.last_row_at or mark.started_at
                self.gpu_seconds_wasted += mark.gpus * max(0.0, beat.at - idle_since)
        return beat, age_s, mark

    def _add_recent(self, rows: int, start: float, end: float) -> None:
        """Rows finished between two times, at an even pace: those of the last minutes count."""
        first = max(start, self.now - RECENT_S)
        overlap = min(end, self.now) - first
        if rows and overlap > 0:
            self.recent_rows += rows * min(1.0, overlap / (end - start))
            self.recent_since = min(self.recent_since, first)

    def rows_per_s(self) -> float:
        """Rows of the last minutes, over the part of them in which there was work."""
        return self.recent_rows / max(1.0, self.now - self.recent_since)


def _beat(files: AttemptFiles, path: Path, now: float) -> tuple[Beat, float]:
    """An attempt's last beat and its age; where it is damaged, its journal is counted."""
    try:
        age_s = max(0.0, now - path.stat().st_mtime)
    except FileNotFoundError:
        age_s = float("inf")
    return Beat.read(path) or Beat(rows=_journaled_rows(files)), age_s


def _journaled_rows(files: AttemptFiles) -> int:
    try:
        return len({record["id"] for record in read_journal(files.journal) if "id" in record})
    except FileNotFoundError:
        return 0


def _working_time(beat: Beat, age_s: float, now: float) -> tuple[float, float]:
    """Between which times an attempt finished its rows, by the clock of who looks."""
    if beat.working_since is None or beat.last_row_at is None:
        return 0.0, 0.0
    ahead = now - age_s - beat.at
    return beat.working_since + ahead, beat.last_row_at + ahead


def _open_attempt(
    shard: int, mark: AttemptMark, beat: Beat, age_s: float, total: int
) -> OpenAttempt:
    return OpenAttempt(
        shard=shard,
        attempt=mark.attempt,
        job=mark.job,
        host=mark.host,
        alive=mark.is_alive(age_s),
        rows=beat.rows,
        total=total,
        started_at=mark.started_at,
        beat_age_s=age_s,
        row_age_s=age_s + beat.at - beat.last_row_at if beat.last_row_at else None,
        gpus=mark.gpus,
    )
