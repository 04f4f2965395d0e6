"""What tests of whole chains share: runs that begin at `judge`, and watching them to their end.

`ready_to_judge` makes a run directory in which everything before `judge` is finished, without any
training: its arrays import no torch, so that a task costs a second. With a `JudgeServer`
(judge_server.py) behind it, a test decides when each row is answered.
"""

from __future__ import annotations

import json
import shlex
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import yaml

from medtrain.cluster.ledger import Ledger, Submission
from medtrain.config import load_config
from medtrain.console import Console
from medtrain.lineage import Lineage
from medtrain.pipeline import Pipeline
from medtrain.run import Run
from medtrain.shards import Unit
from medtrain.stages import by_name
from tests.judge.runs import make_run
from tests.slurm.cluster import PATIENCE_S, Cluster, QueuedJob
from tests.small_run import medtrain

T = TypeVar("T")
SMALL_JOBS = {"gpus": 0, "cpus": 1, "mem_gb": 0.5, "time_min": 30, "look_again_s": 0}
ARRAY = "judge.verdicts"
CLOSE = "judge.verdicts.close"
QUALITIES = ("good", "bad", "fair", "placed")


@dataclass
class Chain:
    """A run on the cluster, by the command line alone."""

    config: Path
    cluster: Cluster
    selection: tuple[str, ...] = ()
    """`--from` and `--until` of this chain."""
    environment: dict[str, str] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    """`key=value` words after the configuration."""

    @cached_property
    def run(self) -> Run:
        loaded = load_config(str(self.config), self.overrides)
        return Run(Path(loaded.output_dir) / loaded.name)

    # ---- what a user types

    def medtrain(self, *arguments: str | Path, expect: int | None = 0) -> str:
        """What a command prints; any exit code but the expected one raises."""
        done = medtrain(*arguments, **self.environment)
        said = done.stdout + done.stderr
        assert expect in (None, done.returncode), f"{arguments}: {done.returncode}\n{said}"
        return said

    def submit(self, *arguments: str) -> str:
        """`medtrain submit`; what it prints."""
        return self.medtrain("submit", self.config, *self.overrides, *self.selection, *arguments)

    def type(self, command: str) -> str:
        """Run a command that medtrain said would help."""
        words = shlex.split(command)
        assert words[0] == "medtrain", command
        return self.medtrain(*words[1:])

    def status(self) -> dict[str, Any]:
        """`medtrain status --json`."""
        tree: dict[str, Any] = json.loads(self.medtrain("status", self.run.root, "--json"))
        return tree

    # ---- where it stands

    def queued(self) -> list[QueuedJob]:
        """Its jobs that are queued or running."""
        return self.cluster.squeue(f"{self.run.name}-")

    def submission(self, key: str) -> Submission:
        """The newest submission of a job of the chain."""
        return Ledger(self.run).latest()[key]

    def job(self, key: str) -> str:
        """The id of the newest job or array of that key."""
        return self.submission(key).job_ids[0]

    def rounds(self, key: str) -> int:
        """How often a job or array was submitted."""
        return sum(submission.key == key for submission in Ledger(self.run).all())

    def tasks_submitted(self, key: str, *, after: int = 0) -> list[tuple[Unit, ...]]:
        """The tasks of every submission of an array but the first `after` ones."""
        submissions = [s for s in Ledger(self.run).all() if s.key == key and s.number >= after]
        return [task for submission in submissions for task in submission.tasks]

    def is_done(self, stage: str) -> bool:
        """Whether a stage has its receipt."""
        return Lineage(self.run).receipt(stage) is not None

    def wait_until(self, answer: Callable[[], T], what: str, seconds: float = PATIENCE_S) -> T:
        """The first truthy answer; without one in time, raises with the run's own words."""
        deadline = time.monotonic() + seconds
        while not (found := answer()):
            assert time.monotonic() < deadline, f"not within {seconds} s: {what}\n{self.evidence()}"
            time.sleep(0.1)
        return found

    def wait_ended(self, seconds: float = PATIENCE_S) -> None:
        """Until nothing of it is queued or runs any more."""
        self.wait_until(lambda: not self.queued(), "the chain ends", seconds)

    def wait_done(self, stage: str = "pairs", seconds: float = PATIENCE_S) -> None:
        """Until a stage is done and nothing of the chain is left in the queue.

        Raises at once where the queue is empty and the stage is not done.
        """
        deadline = time.monotonic() + seconds
        while not self.is_done(stage):
            if not self.queued() and not self.is_done(stage):
                raise AssertionError(f"nothing runs, and {stage} is not done\n{self.evidence()}")
            assert time.monotonic() < deadline, f"not within {seconds} s: {self.evidence()}"
            time.sleep(0.3)
        self.wait_ended()

    def collected(self) -> dict[str, bytes]:
        """What a chain up to `pairs` makes of the verdicts."""
        paths = (self.run.verdicts, self.run.preferences, self.run.dropped_pairs)
        return {path.name: path.read_bytes() for path in paths}

    def log_of(self, key: str, number: int = -1) -> str:
        """The logs of the jobs of a key's newest submission, or of an older one."""
        if number < 0:
            number = self.submission(key).number
        folder = self.run.job_folder(key, number)
        return "\n".join(p.read_text(errors="replace") for p in sorted(folder.glob("*.out")))

    def evidence(self) -> str:
        """Queue, status and the ends of the logs of its jobs."""
        status = medtrain("status", self.run.root)
        parts = [str(job) for job in self.queued()] + [status.stdout, status.stderr]
        for log in sorted((self.run.root / "jobs").glob("*/*.out")):
            tail = log.read_text(errors="replace").splitlines()[-15:]
            parts.append("\n".join([f"--- {log.relative_to(self.run.root)}", *tail]))
        return "\n".join(parts)


def write_config(path: Path, tree: dict[str, Any]) -> Path:
    """A configuration as a file."""
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return path


def ready_to_judge(
    directory: Path,
    cluster: Cluster,
    *,
    rows: int = 24,
    judge: dict[str, Any] | None = None,
    resources: dict[str, Any] | None = None,
) -> Chain:
    """A run whose next stage is `judge`; its chain ends with `pairs`.

    Args:
        directory: an empty place.
        cluster: the development cluster.
        rows: questions `q0`, `q1`, …, with two answers each.
        judge: settings of the judge; the rules judge in three shards unless said otherwise.
        resources: settings of `cluster:`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    source = directory / "rows.jsonl"
    source.write_text('{"question": "What is gout?", "answer": "A disease."}\n')
    tree = {
        "name": f"judged-{uuid.uuid4().hex[:8]}",
        "output_dir": str(directory),
        "model": {"base": "builtin:tiny"},
        "data": {"sources": [{"adapter": "table", "path": str(source)}]},
        "judge": {"kind": "rules", "num_shards": 3, **(judge or {})},
        "cluster": {**SMALL_JOBS, **(resources or {})},
    }
    config = write_config(directory / "judged.yaml", tree)
    chain = Chain(config, cluster, ("--from", "judge", "--until", "pairs"))
    _finish_what_is_before(chain, rows)
    return chain


def _finish_what_is_before(chain: Chain, rows: int) -> None:
    answers = {
        f"q{n}": [f"{QUALITIES[n % 4]} {n}", f"{QUALITIES[n % 3]} {n}."] for n in range(rows)
    }
    run, _ = make_run(chain.run.root, answers)
    stand_ins = ("data/base/weights", "data/tokenizer/vocabulary", "data/card.json",
                 "data/train.jsonl", "data/eval.jsonl", "data/preferences_ready.jsonl",
                 "sft/adapter/weights", "sft/merged/weights", "logs/sft.metrics.jsonl")  # fmt: skip
    for name in stand_ins:
        path = run.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    pipeline = Pipeline(run, load_config(str(chain.config)), Console(quiet=True))
    for stage in map(by_name, ("prepare", "sft", "merge-sft", "generate")):
        fingerprint = pipeline.fingerprint(stage)
        outputs = stage.writes(run, pipeline.config)
        pipeline.lineage.finish(stage.name, fingerprint, outputs, {}, 0.0, "2026-01-01T00:00:00Z")


def undisturbed(directory: Path, cluster: Cluster, **how: Any) -> dict[str, bytes]:
    """What `medtrain run` makes of the same rows on this machine, in one shard."""
    how["judge"] = {**how.get("judge", {}), "num_shards": 1}
    chain = ready_to_judge(directory, cluster, **how)
    chain.medtrain("run", chain.config, *chain.selection)
    return chain.collected()
