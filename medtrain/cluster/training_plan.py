"""Will a training stage fit its GPUs, and how: what `medtrain plan` says before anything is queued.

the stage's jobs → their GPU type and number; the base's architecture → estimates of every strategy
(medtrain.memory) → the one that `auto` takes; the data card → steps, tokens and lengths of rows →
one block for each training stage that is to do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from medtrain.cluster.estimate import Estimator
from medtrain.cluster.paths import Paths, paths_of
from medtrain.cluster.site import resources_of
from medtrain.cluster.workload import TrainingLoad, training_load
from medtrain.errors import DataError
from medtrain.files import read_json
from medtrain.gpus import KNOWN, Gpu, gpu_of
from medtrain.memory import Architecture, Choice, Estimate, Work, estimate, strategies_for, work_of
from medtrain.memory.estimate import trained_parameters
from medtrain.run import Trained


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of the training rows, as `prepare` counted them."""

    mean: float
    p95: int
    longest: int
    width: int
    """Tokens of a bin."""
    rows: tuple[int, ...]
    """Rows of each bin; the first has those of up to `width` tokens."""

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {"mean": self.mean, "p95": self.p95, "max": self.longest,
                "histogram": {"width": self.width, "rows": list(self.rows)}}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fitting:
    """What is known of a stage's memory; only where it uses GPUs and the base's sizes are known."""

    architecture: Architecture
    work: Work
    estimates: tuple[Estimate, ...]
    """One a strategy: without activation checkpointing where that fits, else as it would run."""


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """One training stage that is to do."""

    stage: Trained
    nodes: int
    gpus: int
    """A node."""
    gpu: Gpu
    assumed: bool
    """Whether the type is a guess, because the configuration names none."""
    unknown: str | None
    """The type that the configuration names, where medtrain does not know it."""
    load: TrainingLoad
    lengths: Lengths | None
    choice: Choice
    fitting: Fitting | None
    paths: Paths
    in_16_bits: Estimate | None
    """Where the base would fit unquantised too, without checkpointing: what that would take."""

    def to_json(self) -> dict[str, Any]:
        """As a JSON object; bytes are those of one GPU."""
        choice = self.choice
        return {
            "stage": self.stage,
            "nodes": self.nodes,
            "gpus_per_node": self.gpus,
            "gpu": self.gpu.name if self.gpus else None,
            "gpu_bytes": self.gpu.memory_bytes if self.gpus else None,
            "gpu_assumed": self.assumed,
            "rows": self.load.rows,
            "rows_a_step": self.load.rows_a_step,
            "steps": self.load.steps,
            "tokens": None if self.load.tokens is None else float(f"{self.load.tokens:.3g}"),
            "lengths": self.lengths.to_json() if self.lengths else None,
            "strategy": choice.strategy,
            "activation_checkpointing": choice.checkpointing,
            "fits": choice.fits,
            "reason": choice.reason,
            "paths": self.paths._asdict(),
            "fits_in_16_bits": self.in_16_bits is not None,
            **_memory_json(self.fitting, self.gpu),
        }


def _memory_json(fitting: Fitting | None, gpu: Gpu) -> dict[str, Any]:
    if fitting is None:
        return {"parameters": None, "trained_parameters": None, "strategies": []}
    parameters = fitting.architecture.parameters
    return {
        "parameters": {"total": parameters.total, **parameters._asdict()},
        "trained_parameters": trained_parameters(fitting.architecture, fitting.work),
        "strategies": [
            {**one.to_json(), "fits": one.peak <= gpu.memory_bytes} for one in fitting.estimates
        ],
    }


def plan_training(estimator: Estimator, stage: Trained) -> TrainingPlan:
    """Everything that is known about a training stage before it runs."""
    config = estimator.config
    wanted = resources_of(config, stage)
    processes = estimator.hardware.processes(stage)
    choice, gpu = estimator.hardware.choice(stage), estimator.hardware.gpu(stage)
    return TrainingPlan(
        stage=stage,
        nodes=wanted.nodes or 1,
        gpus=wanted.gpus or 0,
        gpu=gpu,
        assumed=bool(wanted.gpus) and gpu_of(wanted) is None,
        unknown=wanted.gpu_type if wanted.gpus and gpu_of(wanted) is None else None,
        load=training_load(config, estimator.sizes, stage, processes),
        lengths=_lengths(estimator) if stage == "sft" else None,
        choice=choice,
        fitting=_fitting(estimator, stage, processes),
        paths=paths_of(
            config, stage, gpu if wanted.gpus else None, estimator.hardware.architecture, choice
        ),
        in_16_bits=_in_16_bits(estimator, stage, processes),
    )


def _in_16_bits(estimator: Estimator, stage: Trained, processes: int) -> Estimate | None:
    """What the unquantised base would take, where it would fit every GPU whole."""
    architecture, gpu = estimator.hardware.architecture, estimator.hardware.gpu(stage)
    if architecture is None or not processes or estimator.config.model.quantization != "nf4":
        return None
    work = work_of(estimator.config, stage, architecture, auto_bytes=gpu.auto_bytes)
    plain = estimate(architecture, replace(work, quantized=False), gpus=processes)
    return plain if work.dtype_bytes == 2 and plain.peak <= gpu.memory_bytes else None


def _fitting(estimator: Estimator, stage: Trained, processes: int) -> Fitting | None:
    architecture, gpu = estimator.hardware.architecture, estimator.hardware.gpu(stage)
    if architecture is None or not processes:
        return None
    choice = estimator.hardware.choice(stage)
    work = work_of(
        estimator.config,
        stage,
        architecture,
        auto_bytes=gpu.auto_bytes,
        optimizer=choice.optimizer,
    )
    checkpointing = getattr(estimator.config, stage).activation_checkpointing
    estimates = strategies_for(
        architecture, work, gpus=processes, gpu_bytes=gpu.memory_bytes, checkpointing=checkpointing
    )
    chosen = choice.estimate
    if chosen is not None and all(one.strategy != chosen.strategy for one in estimates):
        estimates.append(chosen)
    return Fitting(architecture, work, tuple(estimates))


def _lengths(estimator: Estimator) -> Lengths | None:
    if not estimator.sizes.prepared:
        return None
    try:
        return _from_counts(read_json(estimator.run.data_card)["tokens"]["train"])
    except (FileNotFoundError, DataError, KeyError, TypeError):
        return None  # a card without lengths, from an older version or of somebody's own making


def _from_counts(counts: Mapping[str, Any]) -> Lengths:
    histogram = counts["histogram"]
    return Lengths(
        mean=float(counts["mean"]),
        p95=int(counts["p95"]),
        longest=int(counts["max"]),
        width=int(histogram["width"]),
        rows=tuple(int(rows) for rows in histogram["rows"]),
    )


def warnings_of_training(plan: TrainingPlan, dtype: str) -> Iterator[str]:
    """What will not fit, or will be slow, with its remedy.

    Args:
        plan: of one stage.
        dtype: `model.dtype`.
    """
    if plan.unknown is not None:
        yield (
            f"{plan.stage}: {plan.unknown} is no GPU that medtrain knows ({', '.join(KNOWN)}): its "
            f"memory is taken to be that of a {plan.gpu.name}"
        )
    if not plan.choice.fits:
        assumed = ", which is assumed" if plan.assumed else ""
        yield f"{plan.stage} does not fit its GPUs ({plan.gpu.name}{assumed}): see above"
    rows = plan.load.rows
    if rows is not None and plan.load.rows_a_step > rows:
        yield (
            f"{plan.stage}: a step has {plan.load.rows_a_step} rows, and there are {rows} to train "
            f"on: lower {plan.stage}.gradient_accumulation or {plan.stage}.batch_size, or take "
            "fewer GPUs"
        )
    slow = {"bfloat16": "computes bfloat16 in float32", "auto": "is given float32 by dtype auto"}
    if plan.gpus and not plan.gpu.bfloat16 and dtype in slow:
        yield (
            f"{plan.stage}: a {plan.gpu.name} has no bfloat16 and {slow[dtype]}, "
            f"{plan.gpu.peak_flops / plan.gpu.float32_flops:.0f} times slower than it could: set "
            "model.dtype=float16"
        )
