"""The shards of a stage without submitit: what slurm/shards.sbatch runs, and `medtrain collect`.

`job shards` takes the shards of one array task from Slurm's environment; the first task that comes
begins the stage and settles the plan, the others find it. `collect` closes what the array has
finished, or says what is missing and how to have it computed.
"""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import NamedTuple

from medtrain.cluster.chain import is_last_phase, phase_of
from medtrain.cluster.ledger import Step
from medtrain.cluster.local import with_shards_for
from medtrain.cluster.repair import missing_tasks
from medtrain.cluster.requeue import requeue
from medtrain.cluster.steps import LOCK_WAIT_S, run_step
from medtrain.config import RunConfig, dump_config
from medtrain.console import Console
from medtrain.errors import ConfigError, TryAgainError
from medtrain.files import write_text
from medtrain.inputs import anchored
from medtrain.pipeline import Pipeline
from medtrain.run import Run
from medtrain.shards import (
    Phase,
    Unit,
    UnsoundShardError,
    attempt_units,
    missing_units,
    open_phase,
)
from medtrain.stage import Stage
from medtrain.stages import STAGES, by_name


class ArrayPlace(NamedTuple):
    """Which task of which array this is."""

    task: int
    strided: bool
    """Whether the array is 0-N without gaps, so that its tasks share out all shards."""
    size: int

    @classmethod
    def from_environment(cls) -> ArrayPlace:
        """From what Slurm tells a task; a plain job is an array of one."""

        def number(name: str, default: int) -> int:
            return int(os.environ.get(f"SLURM_ARRAY_TASK_{name}", default))

        first, last, count = number("MIN", 0), number("MAX", 0), number("COUNT", 1)
        strided = first == 0 and last == count - 1
        return cls(number("ID", 0), strided, count)


class _TimeIsOverError(BaseException):
    """Raised by the signal before the time limit."""


def shards_of_this_task(run: Run, config: RunConfig, stage: str, console: Console) -> None:
    """Compute the shards of this array task.

    Raises:
        ConfigError: the stage has no shards.
        DataError: a stage before it is not done.
        TryAgainError: time was over; the job has been queued again.
    """
    place = ArrayPlace.from_environment()
    row, pipeline = _sharded(stage, config), Pipeline(run, config, console)
    pipeline.check_before(row)
    run.create()
    step = _next_phase(run, config, row)
    if step is None:
        console.event("stage_skip", f"{stage} is finished", stage=stage)
        return
    with run.lock(wait_s=LOCK_WAIT_S):
        _begin(run, config, pipeline, step, place)
    signal.signal(signal.SIGUSR1, _stop)
    try:
        with phase_of(step).open(run, config) as phase:
            attempt_units(phase, _share(phase, place), console)
    except _TimeIsOverError:
        requeue(config.cluster.max_requeues)
        raise TryAgainError("The time limit is near: finished rows are kept") from None


def collect_stage(run: Run, config: RunConfig, stage: str, console: Console) -> None:
    """Collect what an array has finished; of the last phase, finish the stage.

    Raises:
        ConfigError: the stage has no shards.
        TryAgainError: shards are missing.
    """
    row = _sharded(stage, config)
    step = _next_phase(run, config, row)
    if step is None:
        console.event("stage_skip", f"{stage} is finished", stage=stage)
        return
    try:
        with run.lock(wait_s=LOCK_WAIT_S):
            run_step(run, config, console, ("close", step[1], step[2]))
    except UnsoundShardError as error:
        left = missing_tasks(run, config, step)
        shards = ",".join(sorted({str(shard) for task in left for _, shard in task}, key=int))
        raise TryAgainError(
            f"{sum(map(len, left))} shards of {stage} are missing: {shards}",
            fix=f"sbatch --array={shards} slurm/shards.sbatch {stage} {run.root}, and then this "
            f"again. Or let medtrain do it: medtrain resume {run.root}",
        ) from error
    if not is_last_phase(step, config):
        console.event("collected", f"{step[2]} of {stage} are collected; {stage} goes on with its "
                      "next array", stage=stage, phase=step[2])  # fmt: skip


def _stop(number: int, frame: FrameType | None) -> None:
    raise _TimeIsOverError


def _sharded(stage: str, config: RunConfig) -> Stage:
    names = [s.name for s in STAGES if s.phases]
    if stage not in names:
        raise ConfigError(f"{stage} has no shards", fix=f"Stages that have: {', '.join(names)}")
    return by_name(stage)


def _next_phase(run: Run, config: RunConfig, stage: Stage) -> Step | None:
    """The phase that is not collected; None where the stage is done."""
    if Pipeline(run, config, Console(quiet=True)).standing(stage).state == "done":
        return None
    phases = stage.active_phases(config)
    for row in phases[:-1]:
        with row.open(run, config) as phase:
            if not all(s.collected.exists() for s in phase.sets) or missing_units(phase):
                return ("shards", stage.name, row.name)
    return ("shards", stage.name, phases[-1].name)


def _begin(run: Run, config: RunConfig, pipeline: Pipeline, step: Step, place: ArrayPlace) -> None:
    """The first task of an array begins the stage, with a shard for every task at least; the others
    find it begun."""
    stage = by_name(step[1])
    fingerprint = pipeline.fingerprint(stage).digest
    if pipeline.lineage.started(stage.name) != fingerprint:
        write_text(run.config, dump_config(anchored(config)))
        pipeline.begin(stage)
    dealt_out = with_shards_for(config, place.size) if place.strided else config
    with phase_of(step).open(run, dealt_out) as phase:
        if not all((s.directory / "plan.json").exists() for s in phase.sets):
            open_phase(phase)


def _share(phase: Phase, place: ArrayPlace) -> list[Unit]:
    """What is missing and falls to this task."""
    units = sorted(missing_units(phase), key=lambda unit: (unit[1], unit[0]))
    if place.strided:
        return [unit for unit in units if unit[1] % place.size == place.task]
    return [unit for unit in units if unit[1] == place.task]
