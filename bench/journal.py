"""What resuming, marking, journaling and publishing cost a shard, as a share of its time.

    python bench/journal.py [--rows 1000] [--row-ms 20] [--row-bytes 1500] [--directory DIR]

One shard whose rows take 20 ms each (slept), in batches of one (the dearest) and of 16. The work
clocks itself: all other time of the attempt counts as the protocol's, the fsyncs included. Choose
the directory on the file system in question.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from medtrain.shards.attempt import ShardFiles, run_attempt
from medtrain.shards.plan import Request, make_plan


def main() -> None:
    arguments = parse_arguments()
    for batch_size in (1, 16):
        with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
            print(json.dumps(measure(Path(name), arguments, batch_size)))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=1_000)
    parser.add_argument("--row-ms", type=float, default=20.0)
    parser.add_argument("--row-bytes", type=int, default=1_500)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    return parser.parse_args()


def measure(directory: Path, arguments: argparse.Namespace, batch_size: int) -> dict[str, Any]:
    """An attempt at one shard; the share of its time that was not spent on rows."""
    requests = [Request(f"medqa-train-{i:07d}", {"x": i}) for i in range(arguments.rows)]
    plan = make_plan(requests, {}, batch_size=batch_size)
    text = "é" * (arguments.row_bytes // 2)
    working = 0.0

    def work(batches: Iterable[list[str]]) -> Iterator[tuple[str, dict[str, Any]]]:
        nonlocal working
        for batch in batches:
            for row in batch:
                started = time.perf_counter()
                time.sleep(arguments.row_ms / 1000)
                working += time.perf_counter() - started
                yield row, {"text": text, "tokens": 300}

    started, started_cpu = time.perf_counter(), time.process_time()
    run_attempt(plan, 0, ShardFiles(directory, 0), work, lambda result: None)
    seconds, cpu = time.perf_counter() - started, time.process_time() - started_cpu
    return {
        "rows": arguments.rows,
        "batch_size": batch_size,
        "seconds": round(seconds, 2),
        "protocol_percent": round(100 * (seconds - working) / seconds, 2),
        "protocol_cpu_percent": round(100 * cpu / seconds, 2),
    }


if __name__ == "__main__":
    main()
