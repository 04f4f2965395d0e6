"""Collecting a stage's shards into one file: speed, memory, and a plain merge beside it.

    python bench/collect.py [--rows 1000000] [--shards 1000] [--row-bytes 1500] [--directory /tmp]

Builds the shards of a finished stage in a temporary directory (rows in random order, as costs
deal them out), then runs both sides, each in a process of its own, on the same files: `collect` as
a collect job runs it (plan from disk, checksums, row ids, receipt; at most 1,024 open files), and
the merge that one would write by hand (json.loads every line into a dict, json.dumps in order, no
checks). Needs three times the size of the rows on disk, and for the plain merge twice that size in
memory. A core is enough.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import shutil
import tempfile
import threading
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medtrain.files import fsync_directory, publish, sealed, sha256_file, write_bytes
from medtrain.shards.collect import collect
from medtrain.shards.plan import Layout, Plan, ids_digest
from medtrain.shards.shard_files import ShardFiles, plan_path


def main() -> None:
    arguments = parse_arguments()
    needed = 3.3 * arguments.rows * arguments.row_bytes
    free = shutil.disk_usage(arguments.directory).free
    if free < needed:
        raise SystemExit(
            f"needs {needed / 1e9:.1f} GB in {arguments.directory}; {free / 1e9:.1f} GB are free"
        )
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        stage = Path(name)
        size = build(stage, arguments.rows, arguments.shards, arguments.row_bytes)
        sides = {"medtrain": collect_side, "json.loads, dict, json.dumps": merge_side}
        measured = {name: in_own_process(side, stage) for name, side in sides.items()}
        same = sha256_file(stage / "merged.jsonl") == sha256_file(stage / "collected.jsonl")
    result: dict[str, Any] = {
        "rows": arguments.rows,
        "shards": arguments.shards,
        "MB": size // 10**6,
    }
    for name, (wall_s, cpu_s, peak_mb, anonymous_mb) in measured.items():
        result[name] = {
            "MB_per_s": round(size / 1e6 / wall_s),
            "MB_per_cpu_s": round(size / 1e6 / cpu_s),
            "peak_rss_MB": round(peak_mb),
            "peak_anonymous_MB": round(anonymous_mb),
        }
    ours, plain = measured.values()
    result["ratio_cpu"] = round(plain[1] / ours[1], 1)
    result["ratio_memory"] = round(plain[2] / ours[2], 1)
    result["same_bytes"] = same
    print(json.dumps(result, indent=2))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=1_000)
    parser.add_argument("--row-bytes", type=int, default=1_500)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    return parser.parse_args()


def build(stage: Path, rows: int, shards: int, row_bytes: int) -> int:
    """Write plan, result files and receipts; returns the bytes of all rows."""
    chance = random.Random(0)
    order = list(range(rows))
    chance.shuffle(order)
    dealt = tuple(array("I", order[shard::shards]) for shard in range(shards))
    digests = tuple(ids_digest([row_id(i) for i in positions]) for positions in dealt)
    layout = Layout("0" * 32, 1, dealt, digests)
    write_bytes(plan_path(stage), sealed(layout.to_json()))
    words = [f"word{i}é" for i in range(5000)]
    text = " ".join(chance.choice(words) for _ in range(200_000))
    return sum(build_shard(stage, layout, shard, text, row_bytes) for shard in range(shards))


def row_id(position: int) -> str:
    return f"medqa-train-{position:07d}"


def build_shard(stage: Path, layout: Layout, shard: int, text: str, row_bytes: int) -> int:
    files = ShardFiles(stage, shard)
    rows = files.attempt("1.0.a").rows
    rows.parent.mkdir(parents=True)
    with rows.open("wb") as handle:
        for position in layout.positions(shard):
            start = position * 7919 % (len(text) - 2 * row_bytes)
            answers = [
                {"index": i, "text": text[start + i : start + row_bytes // 2 - 60]} for i in (0, 1)
            ]
            line = {"id": row_id(position), "candidates": answers, "tokens": 300}
            handle.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
    size = rows.stat().st_size
    receipt = {
        "plan_id": layout.plan_id,
        "shard": shard,
        "attempt": "1.0.a",
        "attempts": 1,
        "rows": len(layout.positions(shard)),
        "row_ids_digest": layout.digests[shard],
        "bytes": size,
        "sha256": sha256_file(rows),
        "errors": 0,
        "quarantined": 0,
        "tokens": 300 * len(layout.positions(shard)),
        "seconds": 20.0,
    }
    publish(files.done, sealed(receipt))
    return size


def collect_side(stage: Path) -> None:
    collect(Plan.read(plan_path(stage)), stage, stage / "collected.jsonl")


def merge_side(stage: Path) -> None:
    by_id: dict[str, Any] = {}
    for path in sorted(stage.glob("shards/*/*/rows.jsonl")):
        with path.open("rb") as handle:
            for line in handle:
                row = json.loads(line)
                by_id[row["id"]] = row
    with (stage / "merged.jsonl").open("wb") as out:
        for key in sorted(by_id):
            out.write(json.dumps(by_id[key], ensure_ascii=False).encode() + b"\n")
        out.flush()
        os.fsync(out.fileno())
    fsync_directory(stage)


Measured = tuple[float, float, float, float]
"""Wall seconds, processor seconds, peak resident MB, peak anonymous MB."""


def in_own_process(side: Callable[[Path], None], stage: Path) -> Measured:
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    process = context.Process(target=measure, args=(side, stage, answers))
    process.start()
    measured: Measured = answers.get()
    process.join()
    return measured


def measure(side: Callable[[Path], None], stage: Path, answers: Any) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
    peak = [0.0]
    over = threading.Event()
    watcher = threading.Thread(target=watch_memory, args=(peak, over), daemon=True)
    watcher.start()
    wall, cpu = time.perf_counter(), time.process_time()
    side(stage)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    over.set()
    watcher.join()
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    answers.put((wall, cpu, rss, peak[0]))


def watch_memory(peak: list[float], over: threading.Event) -> None:
    while not over.wait(0.02):
        status = Path("/proc/self/status").read_text(encoding="ascii")
        anonymous = status.partition("RssAnon:")[2].split()[0]
        peak[0] = max(peak[0], int(anonymous) / 1024)


if __name__ == "__main__":
    main()
