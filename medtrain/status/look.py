"""A look at every stage of a run, by its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

from medtrain.config import RunConfig
from medtrain.console import Console
from medtrain.pipeline import Pipeline
from medtrain.run import Run
from medtrain.stage import Stage, summary
from medtrain.stages import needed_before, stages_of
from medtrain.status.advice import Advice, advise
from medtrain.status.facts import Failure, GpuTime, StageStatus, State, gpu_json
from medtrain.status.holder import living_holder
from medtrain.status.sharded import sharded_progress
from medtrain.status.table import StatusTable
from medtrain.status.training import newest_checkpoint, training_progress


@dataclass(frozen=True)
class RunStatus:
    """A run's stages, what goes on, and what is next."""

    run: Run
    stages: tuple[StageStatus, ...]
    holder: str = ""
    """The process that holds the run directory, if there is one."""
    submitted: bool = False
    """Whether the run was ever handed to Slurm."""
    slurm: Literal["unasked", "answers", "silent", "absent"] = "unasked"
    """What came of asking Slurm; `absent`: this machine has none."""
    slurm_silent_since: float | None = None
    """Seconds since the epoch."""

    @property
    def next_stage(self) -> str | None:
        """The first stage that is not done."""
        return next((stage.name for stage in self.stages if stage.state != "done"), None)

    @property
    def done(self) -> bool:
        """Whether every stage is."""
        return self.next_stage is None

    @property
    def alive(self) -> bool:
        """Whether anything runs or is queued."""
        return bool(self.holder) or any(s.state in ("running", "queued") for s in self.stages)

    @property
    def gpu(self) -> GpuTime | None:
        """GPU time of all stages; None where nobody kept it."""
        known = [stage.gpu for stage in self.stages if stage.gpu is not None]
        return sum(known, GpuTime()) if known else None

    @cached_property
    def advice(self) -> Advice:
        """What is going on, and what a person may have to do."""
        return advise(self)

    @property
    def next_command(self) -> str:
        """What to type to go on, to look on, or to read the result."""
        return self.advice.command

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "run": str(self.run.root),
            "done": self.done,
            "alive": self.alive,
            "stages": [stage.to_json() for stage in self.stages],
            "gpu_hours": gpu_json(self.gpu) if self.gpu else None,
            "slurm": self.slurm,
            "slurm_silent_since": self.slurm_silent_since,
            "happening": self.advice.happening,
            "problems": [asdict(problem) for problem in self.advice.problems],
            "needs_person": self.advice.needs_person,
            "next_stage": self.next_stage,
            "next_command": self.next_command,
        }

    def __rich__(self) -> StatusTable:
        return StatusTable(self)


def run_status(
    run: Run,
    config: RunConfig,
    overlay: Callable[[StageStatus], StageStatus] = lambda status: status,
) -> RunStatus:
    """Look at every stage of a run.

    Args:
        run: whose files are read.
        config: what its stages are compared with.
        overlay: adds to a stage's status what the files do not know.
    """
    pipeline = Pipeline(run, config, Console(quiet=True))
    holder = living_holder(run)
    found: list[StageStatus] = []
    for stage in stages_of(config):
        status = overlay(_stage_status(pipeline, stage, bool(holder)))
        behind = _behind(found, stage, run, config) if status.state == "done" else None
        if behind is not None:
            status = replace(status, state="waits", note=f"finished, but {behind} is not")
        found.append(status)
    return RunStatus(run, tuple(found), holder=holder)


def _behind(found: list[StageStatus], stage: Stage, run: Run, config: RunConfig) -> str | None:
    """The first stage before this one that is not done."""
    undone = [status.name for status in found if status.state != "done"]
    if not undone:
        return None
    needed = {needed.name for needed in needed_before(stage, run, config)}
    return next((name for name in undone if name in needed), None)


def _stage_status(pipeline: Pipeline, stage: Stage, held: bool) -> StageStatus:
    standing, receipt = pipeline.standing(stage), pipeline.lineage.receipt(stage.name)
    run, config = pipeline.run, pipeline.config
    if standing.state == "done" and receipt is not None:
        counts = receipt["counts"]
        status = StageStatus(stage.name, "done", summary(counts), receipt["seconds"], counts)
        return sharded_progress(run, config, stage, status) if stage.phases else status
    record = pipeline.lineage.failure(stage.name)
    # A stop that was asked for is no failure.
    failure = None if record is None or record.get("stopped") else _failure(record)
    state: State = "stopped"
    if standing.state == "started" and held:
        # A new try forgets the failure of the last one.
        state = "running"
    elif failure is not None:
        state = "failed"
    elif standing.state in ("missing", "stale"):
        state = standing.state
    status = StageStatus(stage.name, state, standing.why, failure=failure)
    if stage.trains and standing.state == "started":
        saved = newest_checkpoint(run, stage.name) if state != "running" else 0
        note = f"saved up to step {saved:,}" if saved else status.note
        return replace(status, amount=training_progress(run, stage.name), note=note)
    return sharded_progress(run, config, stage, status) if stage.phases else status


def _failure(record: Mapping[str, Any]) -> Failure:
    return Failure(str(record["message"]).strip(), str(record["fix"]), int(record["exit_code"]))
