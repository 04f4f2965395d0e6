"""Shard sets with cheap, exact work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from medtrain.console import Console
from medtrain.shards import Phase, Request, ShardSet, ShardSummary, run_here

QUIET = Console(quiet=True)
Rows = Iterator[tuple[str, dict[str, Any]]]


def requests(count: int) -> list[Request]:
    return [Request(f"row-{i}", {"x": i}, cost=(i * 7919) % 13) for i in range(count)]


def square(batches: Iterable[list[Request]]) -> Rows:
    for batch in batches:
        for request in batch:
            yield request.id, {"y": request.payload["x"] ** 2, "text": "é\n🙂", "tokens": 3}


def refuse(batches: Iterable[list[Request]]) -> Rows:
    raise AssertionError(f"{sum(map(len, batches))} rows are computed again")
    yield


def bring(
    directory: Path,
    rows: Sequence[Request],
    work: Any = square,
    settings: Any = None,
    **layout: int,
) -> ShardSummary:
    shard_set = ShardSet(
        key="t",
        title="t",
        directory=directory,
        requests=rows,
        settings=settings or {"model": "m"},
        work=work,
        collected=directory / "collected.jsonl",
        **layout,
    )
    return run_here(Phase("t", (shard_set,)), QUIET)[0]


def run(directory: Path, rows: Sequence[Request], work: Any = square, **layout: int) -> bytes:
    bring(directory, rows, work, **layout)
    return (directory / "collected.jsonl").read_bytes()
