"""A run directory in the middle of its chain, and a Slurm that says what a test wants it to say.

The files are written by the rooms that own them; of Slurm there are only its commands, as scripts
on the PATH that print text as squeue and sacct of a real cluster printed it.
"""

from __future__ import annotations

import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from medtrain.cluster.ledger import Ledger, Submission
from medtrain.config import RunConfig, load_config
from medtrain.console import Console
from medtrain.errors import MedtrainError
from medtrain.lineage import Fingerprint
from medtrain.pipeline import Pipeline
from medtrain.run import Run
from medtrain.shards import Phase, Request, ShardSet, attempt_units, open_phase
from medtrain.stages import STAGES, by_name
from medtrain.status.sharded import shard_directory
from tests.small_run import write_config

QUIET = Console(quiet=True)


class Scene:
    """A run, its configuration, and what Slurm says about it."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        base = directory / "base"
        base.mkdir()
        (base / "config.json").write_text("{}")
        path = write_config(directory, base)
        self.run = Run(directory / "runs" / "small")
        self.run.create()
        shards = ["generate.num_shards=4", "judge.num_shards=2", "evaluate.num_shards=2"]
        self.config: RunConfig = load_config(str(path), shards)
        self.run.config.write_text(path.read_text())
        self.ledger = Ledger(self.run)
        self.pipeline = Pipeline(self.run, self.config, QUIET)
        self._bin = directory / "bin"
        self._bin.mkdir()
        monkeypatch.setenv("PATH", str(self._bin))

    # Files

    def finish(self, *names: str, seconds: float = 60.0) -> None:
        """Stages that are done."""
        for name in names:
            stage = by_name(name)
            outputs = stage.writes(self.run, self.config)
            for output in (*outputs, *(self._data_files() if name == "prepare" else ())):
                file = output if output.suffix else output / "file"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(name)
            fingerprint = self.pipeline.fingerprint(stage)
            self.pipeline.lineage.finish(name, fingerprint, outputs, {"rows": 3}, seconds, "now")

    def _data_files(self) -> list[Path]:
        run = self.run
        rows = [run.train_rows, run.eval_rows, run.preference_prompts, run.ready_preferences]
        return [*rows, run.data_card, run.tokenizer]

    def finish_until(self, last: str) -> None:
        """All stages up to this one."""
        names = [stage.name for stage in STAGES]
        self.finish(*names[: names.index(last) + 1])

    def start(self, name: str) -> None:
        """A stage that has begun."""
        self.pipeline.lineage.start(name, Fingerprint({}, {}))

    def fail(self, name: str, error: MedtrainError) -> None:
        """A stage whose try ended with an error."""
        self.start(name)
        self.pipeline.lineage.record_failure(name, error)

    def compute(
        self, stage: str, key: str, done: Iterable[int], *, rows: int = 40, num_shards: int = 4
    ) -> ShardSet:
        """A planned shard set, some of whose shards are finished."""
        shard_set = self.shard_set(stage, key, _answer, rows, num_shards)
        phase = Phase(key, (shard_set,))
        open_phase(phase)
        attempt_units(phase, [(key, shard) for shard in done], QUIET)
        return shard_set

    def shard_set(
        self, stage: str, key: str, work: Any, rows: int = 40, num_shards: int = 4
    ) -> ShardSet:
        """A shard set of this run whose rows are computed by `work`."""
        directory = shard_directory(self.run, stage, key)
        return ShardSet(
            key=key,
            title=key,
            directory=directory,
            requests=[Request(f"r{i}", {"i": i}) for i in range(rows)],
            settings={},
            work=work,
            collected=directory / "collected.jsonl",
            num_shards=num_shards,
        )

    # The ledger

    def submitted(
        self, key: str, stages: Sequence[str], *job_ids: str, gpus: int = 0, tasks: int = 0
    ) -> Submission:
        """A job in the ledger; with `tasks`, an array of shards 0, 1, …"""
        verb = "shards" if tasks else "run"
        units = [[(key.partition(".")[2], shard)] for shard in range(tasks)]
        steps = [(verb, stage, "") for stage in stages]
        intent = self.ledger.intend(key, steps=steps, tasks=units, gpus=gpus)
        assert intent is not None
        return self.ledger.note(intent, job_ids, [0] * len(job_ids)) if job_ids else intent

    # Slurm

    def slurm_says(self, queue: str, history: str | None = None) -> None:
        """What squeue and sacct print; without a history there are no accounts."""
        self._command("squeue", queue)
        if history is None:
            self._command("sacct", "", "Slurm accounting storage is disabled", code=1)
        else:
            self._command("sacct", history)

    def slurm_is_down(self) -> None:
        """Slurm's commands are there, slurmctld is not."""
        why = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
        self._command("squeue", "", why, code=1)

    def calls(self) -> list[str]:
        """The commands that were called, in order."""
        log = self._bin / "calls"
        return log.read_text().split() if log.exists() else []

    def _command(self, name: str, out: str, err: str = "", *, code: int = 0) -> None:
        script, said = self._bin / name, self._bin / f"{name}.txt"
        said.write_text(out)
        script.write_text(
            f"#!/bin/sh\necho {name} >> {self._bin}/calls\n/bin/cat {said}\n"
            f"echo '{err}' >&2\nexit {code}\n"
        )
        script.chmod(script.stat().st_mode | stat.S_IXUSR)


def queue_line(
    job: str,
    state: str,
    *,
    reason: str = "None",
    used: str = "0:00",
    raw: str = "",
    restarts: int = 0,
    starts: str = "N/A",
    status: int = 0,
    comment: str = "",
) -> str:
    """A line as squeue prints it with the format that is asked for."""
    raw = raw or job.partition("_")[0]
    fields = [job, raw, state, reason, used, "1:00:00", "node1", starts, restarts, status, comment]
    return "|".join(map(str, fields)) + "|\n"


def history_line(
    job: str, state: str, *, start: float, seconds: int, raw: str = "", code: str = "0:0"
) -> str:
    """A line as sacct prints it."""

    def stamp(at: float) -> str:
        return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(at))

    end = "Unknown" if state == "RUNNING" else stamp(start + seconds)
    raw = raw or job.partition("_")[0]
    return "|".join([job, raw, state, code, stamp(start), end, str(seconds), "node1"]) + "\n"


def _answer(batches: Iterable[Sequence[Request]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for batch in batches:
        for request in batch:
            yield request.id, {"text": "yes"}
