"""The names in a shard's directory.

<stage>/shards/00012/done.json                       the receipt
<stage>/shards/00012/<attempt>/attempt.json          who works: job, host, process
                               heartbeat             how far it is; touched while it works
                               ended-<how>           what the heartbeat is called afterwards
                               journal.jsonl         finished rows, and rows in flight
                               rows.jsonl            results in plan order
                               failure.json          the error that ended it
                               forgiven              its death no longer counts
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class AttemptFiles:
    """The names in one attempt's directory."""

    root: Path

    @property
    def name(self) -> str:
        """The attempt."""
        return self.root.name

    @property
    def mark(self) -> Path:
        """Who works."""
        return self.root / "attempt.json"

    @property
    def heartbeat(self) -> Path:
        """How far it is, while it works."""
        return self.root / "heartbeat"

    @property
    def journal(self) -> Path:
        """Finished rows, and rows in flight."""
        return self.root / "journal.jsonl"

    @property
    def rows(self) -> Path:
        """Results in plan order."""
        return self.root / "rows.jsonl"

    @property
    def failure(self) -> Path:
        """The error that ended it."""
        return self.root / "failure.json"

    @property
    def forgiven(self) -> Path:
        """Says that its death no longer counts, nor any row that it gave up on."""
        return self.root / "forgiven"

    def ended(self, how: str) -> Path:
        """What the heartbeat is called when the attempt has ended; a rename needs no disk space."""
        return self.root / f"ended-{how}"

    def end_mark(self) -> Path | None:
        """The heartbeat of an attempt that has ended; None where it works still, or died."""
        with suppress(FileNotFoundError):
            return next((p for p in self.root.iterdir() if p.name.startswith("ended-")), None)
        return None


@dataclass(frozen=True, slots=True)
class ShardFiles:
    """The names in one shard's directory."""

    stage: Path
    shard: int
    root: Path = field(init=False)
    """The shard's directory."""

    def __post_init__(self) -> None:
        # Made once: with thousands of shards, joining paths is what a look at progress costs.
        object.__setattr__(self, "root", self.stage / f"shards/{self.shard:05d}")

    @property
    def done(self) -> Path:
        """The receipt."""
        return self.root / "done.json"

    def attempt(self, name: str) -> AttemptFiles:
        """One attempt's names."""
        return AttemptFiles(self.root / name)

    def attempts(self) -> Iterator[AttemptFiles]:
        """Every attempt that there is, by name."""
        with suppress(FileNotFoundError):
            with os.scandir(self.root) as entries:
                names = sorted(entry.name for entry in entries if entry.is_dir())
            yield from map(self.attempt, names)


def plan_path(stage: Path) -> Path:
    """The plan of a stage."""
    return stage / "plan.json"


def shards_root(stage: Path) -> Path:
    """The directory of all shards."""
    return stage / "shards"
