"""What is computed in shards: sets of independent rows, and the phases that group them.

A stage hands a `Phase` to its `Drive` and finds the collected files when the drive returns. Who
computes is the drive's business: this process, workers on this machine, or an array of jobs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from medtrain.console import Console
from medtrain.shards.plan import Request

Work = Callable[[Iterable[list[Request]]], Iterator[tuple[str, dict[str, Any]]]]
"""Batches with rows still to do, pulled one after the other → (row id, result) as rows finish. A
result with the key `error` is a failed row."""

Unit = tuple[str, int]
"""The key of a shard set, and a shard of it."""


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class ShardSet:
    """Independent rows that end in one file."""

    key: str
    """Its name within the stage, such as `answers.base`."""
    title: str
    """For people."""
    directory: Path
    """Plan, shards, receipt."""
    requests: Sequence[Request]
    """The rows; ids are unique."""
    settings: Mapping[str, Any]
    """What else changes results: model digest, sampling, judge settings."""
    work: Work
    """Computes batches; called only when something is left to do, so it may load models."""
    collected: Path
    """The file to write: one `{"id": …, **result}` a line, in the order of the requests."""
    batch_size: int = 1
    """Rows that are computed together; part of no row's identity."""
    num_shards: int = 1
    """Pieces the batches are dealt out to; changes no byte of the result."""
    measured_in: Path | None = None
    """Directory of an earlier shard set of the same kind of work, whose measured seconds tell how
    long these rows will take."""
    release: Callable[[], None] = field(default=_nothing)
    """Gives back what `work` holds; called when no more of its shards are computed here. A set may
    leave it to a later one that uses the same model."""


@dataclass(frozen=True)
class Phase:
    """Shard sets that can be computed at the same time."""

    name: str
    sets: tuple[ShardSet, ...]

    def by_key(self, key: str) -> ShardSet | None:
        """The set of that key; None where there is nothing to compute under it."""
        return next((s for s in self.sets if s.key == key), None)


class ShardSummary(NamedTuple):
    """What a shard set came to."""

    rows: int
    errors: int
    """Rows whose result has an `error`."""
    tokens: int
    seconds: float
    """Sum over the shards, earlier attempts left out."""


Drive = Callable[[Phase, Console], list[ShardSummary]]
"""Brings a phase's sets to their collected files; one summary a set."""


@contextmanager
def closing_sets(phase: Phase) -> Iterator[Phase]:
    """The phase, whose sets are released when the block ends."""
    try:
        yield phase
    finally:
        for shard_set in phase.sets:
            shard_set.release()
