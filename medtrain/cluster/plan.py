"""`medtrain plan`: what would run, what it is likely to take, and what a person does first.

stages that are done, by their receipts → jobs of the others, as `submit` would queue them → an
estimate of each (medtrain.cluster.estimate), of a training stage also whether it fits its GPUs
(medtrain.cluster.training_plan) → one table, a total, the assumptions, warnings, and the commands.
Nothing is written, no job is asked for, Slurm need not be there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from medtrain.cluster.chain import plan_chain, steps_of
from medtrain.cluster.estimate import Basis, Estimator
from medtrain.cluster.ledger import Step
from medtrain.cluster.paths import job_path, warnings_of_answering
from medtrain.cluster.plan_commands import commands_of
from medtrain.cluster.proportions import out_of_proportion
from medtrain.cluster.site import resources_of
from medtrain.cluster.training_plan import TrainingPlan, plan_training, warnings_of_training
from medtrain.config import JobKind, RunConfig
from medtrain.errors import ConfigError
from medtrain.gpus import (
    DECODING_SHARE,
    KNOWN,
    LOAD_BYTES_PER_S,
    STEP_FLOOR_S,
    TRAINING_SHARE,
    gpu_of,
)
from medtrain.pipeline import table
from medtrain.run import Run, Trained
from medtrain.selection import Selection
from medtrain.stage import Stage
from medtrain.stages import needed_before


@dataclass(frozen=True, slots=True)
class PlannedJob:
    """One line of the plan."""

    key: str
    state: Literal["done", "to do"]
    steps: tuple[Step, ...]
    kind: JobKind
    tasks: int
    nodes: int
    gpus: int
    """A node."""
    time_limit_s: float | None
    task_s: float | None
    """Of one task, loading included; None if nobody knows, or it is minutes of a CPU."""
    load_s: float
    """Of that: before anything is computed."""
    basis: Basis
    note: str = ""
    path: str = ""
    """What a job computes with that trains nothing, in words."""

    @property
    def gpu_hours(self) -> float | None:
        """Of all tasks; None if nobody knows."""
        devices = self.nodes * self.gpus
        if not devices or self.basis == "short":
            return 0.0
        return None if self.task_s is None else self.task_s * self.tasks * devices / 3600

    def to_json(self) -> dict[str, Any]:
        """As a JSON object; what nobody knows is null."""
        return {
            "job": self.key,
            "state": self.state,
            "steps": [list(step) for step in self.steps],
            "kind": self.kind,
            "tasks": self.tasks,
            "nodes": self.nodes,
            "gpus_per_node": self.gpus,
            "time_limit_s": self.time_limit_s,
            "task_s": None if self.task_s is None else float(f"{self.task_s:.2g}"),
            "gpu_hours": None if self.gpu_hours is None else float(f"{self.gpu_hours:.2g}"),
            "basis": self.basis,
            "note": self.note,
            "path": self.path or None,
        }


@dataclass(frozen=True, slots=True)
class RunPlan:
    """The jobs of a run, and what is to be known about them."""

    run: Run
    jobs: tuple[PlannedJob, ...]
    training: tuple[TrainingPlan, ...]
    """The training stages that are to do."""
    assumptions: tuple[str, str]
    """Where rows and tokens come from; how fast a GPU is taken to be."""
    warnings: tuple[str, ...]
    commands: tuple[str, ...]
    """What a person types, in order; the last one starts the chain, or looks again where a
    training does not fit."""

    @property
    def to_do(self) -> list[PlannedJob]:
        """Those that would be queued."""
        return [job for job in self.jobs if job.state == "to do"]

    @property
    def gpu_hours(self) -> float:
        """Of those that would be queued, as far as it is known."""
        return sum(job.gpu_hours or 0.0 for job in self.to_do)

    @property
    def unknown(self) -> list[str]:
        """Jobs with GPUs whose time nobody knows."""
        return [job.key for job in self.to_do if job.gpu_hours is None]

    def check(self) -> None:
        """Nothing, if every training stage fits its GPUs.

        Raises:
            ConfigError: one does not.
        """
        unknown = [stage for stage in self.training if stage.unknown is not None]
        if unknown:
            raise ConfigError(
                f"{unknown[0].unknown} is no GPU that medtrain knows, so that nobody can say "
                f"whether {unknown[0].stage} fits",
                fix=f"Name one of {', '.join(KNOWN)} in cluster.gpu_type or cluster.constraint.",
            )
        too_large = [stage for stage in self.training if not stage.choice.fits]
        if too_large:
            raise ConfigError(
                "; ".join(
                    f"{one.stage} does not fit its GPUs ({one.gpu.name})" for one in too_large
                ),
                fix="\n".join(f"{one.stage}: {one.choice.reason}." for one in too_large),
            )

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "run": str(self.run.root),
            "jobs": [job.to_json() for job in self.jobs],
            "training": [stage.to_json() for stage in self.training],
            "total": {
                "jobs": len(self.to_do),
                "tasks": sum(job.tasks for job in self.to_do),
                "gpu_hours": float(f"{self.gpu_hours:.2g}"),
                "unknown": self.unknown,
            },
            "assumptions": list(self.assumptions),
            "warnings": list(self.warnings),
            "commands": list(self.commands),
        }

    def __rich__(self) -> Any:
        from medtrain.cluster.plan_table import plan_view

        return plan_view(self)


def make_plan(run: Run, config: RunConfig, selection: Selection, config_name: str) -> RunPlan:
    """What `submit` would queue, with estimates.

    Args:
        run: whose receipts tell what is done.
        config: the run's configuration.
        selection: stages to plan.
        config_name: the configuration as it was given, for the commands to type.

    Raises:
        ConfigError: the selection is wrong.
        DataError: a file that the configuration names is not there.
    """
    chosen = [stage for stage in selection.stages() if stage.wanted(config)]
    if not chosen:
        raise ConfigError(
            "None of the chosen stages is part of this run",
            fix=f"dpo.method {config.dpo.method} may have no use for it; choose others.",
        )
    known = table(run, config)
    state = {stage.name: standing.state for stage, standing, _ in known}
    estimator = Estimator(run, config, known)
    # As `submit` does: what comes after a stage that is not done may have to be made anew.
    first = next(
        (i for i, s in enumerate(chosen) if state[s.name] != "done" or s.name in selection.force),
        len(chosen),
    )
    done = [_done(stage, estimator) for stage in chosen[:first]]
    jobs = [*done, *_jobs(config, estimator, chosen[first:])]
    training = [
        plan_training(estimator, cast("Trained", stage.name))
        for stage in chosen[first:]
        if stage.trains
    ]
    before = [s.name for s in needed_before(chosen[0], run, config) if state[s.name] != "done"]
    return RunPlan(
        run=run,
        jobs=tuple(jobs),
        training=tuple(training),
        assumptions=(_about_rows(estimator), _about_speed(config, jobs)),
        warnings=(
            *(line for one in training for line in warnings_of_training(one, config.model.dtype)),
            *warnings_of_answering(
                config, estimator.hardware, [j.kind for j in jobs if j.state == "to do" and j.gpus]
            ),
            *out_of_proportion(jobs, config),
        ),
        commands=(
            tuple(commands_of(config, config_name, jobs, before, selection))
            if all(one.choice.fits for one in training)
            else (f"medtrain plan {config_name} --check",)
        ),
    )


def _done(stage: Stage, estimator: Estimator) -> PlannedJob:
    receipt = estimator.receipts.get(stage.name)
    seconds = float(receipt["seconds"]) if receipt else None
    verb = "train" if stage.trains else "run"
    return PlannedJob(stage.name, "done", ((verb, stage.name, ""),), "cpu", 1, 1, 0, None, seconds,
                      0.0, "measured")  # fmt: skip


def _jobs(config: RunConfig, estimator: Estimator, stages: Sequence[Stage]) -> Iterator[PlannedJob]:
    for job in plan_chain(steps_of(stages, config), config):
        wanted, took = resources_of(config, job.kind), estimator.task(job)
        yield PlannedJob(
            key=job.key,
            state="to do",
            steps=job.steps,
            kind=job.kind,
            tasks=max(1, len(job.tasks)),
            nodes=wanted.nodes or 1,
            gpus=wanted.gpus or 0,
            time_limit_s=wanted.time_min * 60.0 if wanted.time_min else None,
            task_s=took.seconds,
            load_s=took.load_s,
            basis=took.basis,
            note=took.note,
            path=job_path(
                config,
                job.kind,
                estimator.hardware.gpu(job.kind) if wanted.gpus else None,
                estimator.hardware.architecture,
            ),
        )


def _about_rows(estimator: Estimator) -> str:
    sizes = estimator.sizes
    if sizes.prepared:
        return (
            f"Rows and tokens as the data card counts them ({sizes.row_tokens:,.0f} tokens a "
            "training row)."
        )
    return (
        f"Rows: at most what the configuration's limits allow, {sizes.row_tokens:,.0f} tokens each "
        "(half of sft.max_length), until `medtrain prepare` has counted them."
    )


def _about_speed(config: RunConfig, jobs: Sequence[PlannedJob]) -> str:
    kinds = {job.kind for job in jobs if job.gpus}
    asked = [gpu_of(resources_of(config, kind)) for kind in sorted(kinds)]
    if not kinds:
        return "No job uses a GPU."
    named = {gpu.name for gpu in asked if gpu is not None}
    gpus = ", ".join(
        sorted(named | ({"A100 40 GB where none is named"} if None in asked else set()))
    )
    return (
        f"GPU: {gpus}. Guessed: training 4 FLOPs a parameter and token (6 with activation "
        f"checkpointing) at {TRAINING_SHARE:.0%} of its peak; decoding at {DECODING_SHARE:.0%} of "
        f"its memory bandwidth, {STEP_FLOOR_S['transformers'] * 1e3:.0f} ms a step or more; "
        f"weights load at {LOAD_BYTES_PER_S / 1e9:g} GB/s."
    )
