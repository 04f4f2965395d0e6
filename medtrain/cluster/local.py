"""The shards of a stage on several processes of this machine: `--executor local --workers N`.

phase → plans settled here → its tasks dealt out to N workers, each a process of submitit's local
executor with a share of the GPUs → what a worker left undone is dealt out again, a few times →
collected here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medtrain.cluster.tasks import open_run
from medtrain.config import RunConfig
from medtrain.console import Console, show_error
from medtrain.errors import (
    ConfigError,
    DataError,
    MedtrainError,
    as_medtrain_error,
    from_exit_code,
)
from medtrain.files import read_json, write_json
from medtrain.run import Run
from medtrain.shards import (
    Drive,
    Phase,
    ShardSummary,
    Unit,
    attempt_units,
    collect_only,
    missing_units,
    open_phase,
    shard_progress,
)
from medtrain.stage import Stage
from medtrain.stages import by_name

_POLL_S = 0.3
_A_MONTH_MIN = 60 * 24 * 30
_FATAL = (ConfigError.exit_code, DataError.exit_code)


def local_drive(run: Run, config: RunConfig, stage: Stage, workers: int) -> Drive:
    """A drive that computes a stage's shards in `workers` processes.

    Raises (when it drives):
        MedtrainError: shards are missing after all rounds; with the error of a worker.
    """

    def drive(phase: Phase, console: Console) -> list[ShardSummary]:
        open_phase(phase)
        for round_ in range(config.cluster.repair_rounds + 1):
            missing = missing_units(phase)
            if not missing:
                break
            if round_:
                console.warn("repair", f"{len(missing)} shards of {stage.name} are computed again",
                             stage=stage.name, round=round_)  # fmt: skip
            _Round(run, stage, phase, workers, console).compute(missing)
        else:
            raise MedtrainError(
                f"Shards of {stage.name} are missing although they were tried "
                f"{config.cluster.repair_rounds + 1} times",
                fix=f"Look at the logs in {run.root / 'jobs'}; the same command goes on.",
            )
        return collect_only(phase, console)

    return drive


def with_shards_for(config: RunConfig, workers: int) -> RunConfig:
    """The configuration with at least as many shards a stage as there are workers."""
    numbers = {"generate": "num_shards", "judge": "num_shards", "evaluate": "num_shards",
               "dpo": "reference_shards"}  # fmt: skip
    update = {
        name: section.model_copy(update={key: max(workers, getattr(section, key))})
        for name, key in numbers.items()
        if (section := getattr(config, name))
    }
    return config.model_copy(update=update)


@dataclass
class WorkerTask:
    """What one worker does; carried by submitit."""

    root: str
    stage: str
    phase: str
    units: tuple[Unit, ...]
    failure: str
    """Where an error is noted."""

    def __call__(self) -> None:
        """Compute the units."""
        run = Run(Path(self.root))
        config, _ = open_run(run)
        row = next(p for p in by_name(self.stage).phases if p.name == self.phase)
        try:
            with row.open(run, config) as phase:
                attempt_units(phase, self.units, Console(quiet=True))
        except Exception as error:
            known = as_medtrain_error(error)
            show_error(known.message, known.fix)
            note = {"exit_code": known.exit_code, "message": known.message, "fix": known.fix}
            write_json(Path(self.failure), note)
            raise SystemExit(known.exit_code) from None


class _Round:
    """One dealing out of shards to workers."""

    def __init__(
        self, run: Run, stage: Stage, phase: Phase, workers: int, console: Console
    ) -> None:
        self._run, self._stage, self._phase, self._console = run, stage, phase, console
        self._workers = workers
        key = f"{stage.name}.{phase.name}.local"
        taken = len(list((run.root / "jobs").glob(f"{key}.*")))
        self._folder = run.root.absolute() / "jobs" / f"{key}.{taken:03d}"

    def compute(self, units: Sequence[Unit]) -> None:
        """Deal out the shards and wait for the workers to end, however they end."""
        # Neighbours share a model, so a worker gets shards of one set as far as that goes.
        ordered = sorted(units)
        count = min(self._workers, len(ordered))
        size, extra = divmod(len(ordered), count)
        jobs, start = [], 0
        for worker in range(count):
            end = start + size + (worker < extra)
            jobs.append(self._start(worker, tuple(ordered[start:end])))
            start = end
        try:
            self._watch(jobs)
        finally:
            for job in jobs:
                if not job.done():
                    job.cancel()
        self._raise_failure()

    def _start(self, worker: int, units: tuple[Unit, ...]) -> Any:
        import submitit

        executor = submitit.LocalExecutor(self._folder)
        gpus = self._gpus_of(worker)
        executor.update_parameters(
            timeout_min=_A_MONTH_MIN,
            **({"gpus_per_node": len(gpus), "visible_gpus": gpus} if gpus else {}),
        )
        failure = str(self._folder / f"failure.{worker}.json")
        root = str(self._run.root.absolute())
        return executor.submit(WorkerTask(root, self._stage.name, self._phase.name, units, failure))

    def _gpus_of(self, worker: int) -> tuple[int, ...]:
        """A worker's share of the GPUs in sight."""
        gpus = _visible_gpus()
        return tuple(gpus[worker % len(gpus) :: self._workers][:1]) if gpus else ()

    def _watch(self, jobs: Sequence[Any]) -> None:
        directories = [s.directory for s in self._phase.sets]
        total = sum(len(s.requests) for s in self._phase.sets)
        with self._console.progress(f"{self._stage.name} {self._phase.name}", total) as task:
            while not all(job.done() for job in jobs):
                task.update(sum(shard_progress(d).done for d in directories))
                time.sleep(_POLL_S)
            task.update(sum(shard_progress(d).done for d in directories))

    def _raise_failure(self) -> None:
        """An error that a new try would repeat ends the stage."""
        for path in sorted(self._folder.glob("failure.*.json")):
            failure = read_json(path)
            if failure["exit_code"] in _FATAL or failure["exit_code"] == 69:
                raise from_exit_code(failure["exit_code"], failure["message"], failure["fix"])


def _visible_gpus() -> list[int]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [int(n) for n in named.split(",") if n.strip().isdigit()]
    import torch

    return list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
