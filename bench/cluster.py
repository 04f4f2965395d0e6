"""How long it takes to queue a large run, and to look at it.

    sudo slurm/dev-cluster.sh up
    python bench/cluster.py [--shards 1000]

Needs a Slurm to submit to. The chain of configs/quickstart.yaml is submitted with that many shards
in each sharded stage and cancelled at once; then three stages of that many finished shards are
written into a run directory and `medtrain status` looks at them. The baseline of the submission is
one sbatch a task, which is what a loop in a shell does.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from medtrain.config import load_config
from medtrain.console import Console
from medtrain.run import Run
from medtrain.shards import Phase, Request, ShardSet, run_here

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
BASELINE_JOBS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=1000, help="of each sharded stage")
    shards = parser.parse_args().shards
    with tempfile.TemporaryDirectory() as scratch:
        tasks, seconds = measure_submit(Path(scratch), shards)
        one = measure_one_sbatch(Path(scratch))
        shell = one * tasks
        print(f"submit: {tasks:,} tasks in 13 jobs: {seconds:.2f} s; one sbatch a task would take "
              f"{shell:.0f} s ({one * 1000:.0f} ms each): {shell / seconds:.0f}×")  # fmt: skip
        looked = measure_status(Path(scratch), shards)
        print(f"status of 3 × {shards:,} finished shards: {looked:.2f} s")


def overrides(scratch: Path, shards: int) -> list[str]:
    stages = [f"{stage}.num_shards={shards}" for stage in ("generate", "judge", "evaluate")]
    return [f"output_dir={scratch}", "cluster.gpus=0", "cluster.mem_gb=1", "name=big", *stages]


def measure_submit(scratch: Path, shards: int) -> tuple[int, float]:
    """Tasks queued, and the seconds of `medtrain submit`."""
    began = time.perf_counter()
    medtrain("submit", str(CONFIG), *overrides(scratch, shards))
    seconds = time.perf_counter() - began
    medtrain("cancel", str(scratch / "big"))
    pickles = (scratch / "big" / "jobs").glob("*/*_submitted.pkl")
    return sum(1 for _ in pickles), seconds


def measure_one_sbatch(scratch: Path) -> float:
    """Seconds of one sbatch of a job that does nothing."""
    began = time.perf_counter()
    for _ in range(BASELINE_JOBS):
        command = ["sbatch", "--hold", "--job-name=bench", f"--output={scratch}/%j", "--wrap=true"]
        subprocess.run(command, check=True, capture_output=True)
    seconds = (time.perf_counter() - began) / BASELINE_JOBS
    subprocess.run(["scancel", "--name=bench"], check=True)
    return seconds


def measure_status(scratch: Path, shards: int) -> float:
    """Seconds of `medtrain status` on a run with three stages of finished shards."""
    run = Run(scratch / "big")
    config = load_config(run.config)
    sets = [
        ShardSet(key=key, title=key, directory=directory, requests=list(requests(shards)),
                 settings={}, work=work, collected=collected, num_shards=shards)
        for key, directory, collected in (
            ("candidates", run.generate, run.candidates),
            ("verdicts", run.judge, run.verdicts),
            ("answers.base", run.answers_shards("base"), run.answers("base")),
        )
    ]  # fmt: skip
    run_here(Phase("bench", tuple(sets)), Console(quiet=True))
    assert config.generate.num_shards == shards
    began = time.perf_counter()
    medtrain("status", str(run.root))
    return time.perf_counter() - began


def requests(shards: int) -> Iterator[Request]:
    """Ten rows a shard."""
    return (Request(f"row-{i}", {"row": i}) for i in range(10 * shards))


def work(batches: Iterable[list[Request]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for batch in batches:
        for request in batch:
            yield request.id, {"text": "x" * 200, "tokens": 40}


def medtrain(*arguments: str) -> None:
    command = [sys.executable, "-m", "medtrain", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
