"""Which strategy a training stage runs with: the cheapest that fits.

estimates of replicated weights, ZeRO-2, ZeRO-3 and offloaded ZeRO-3, in this order, each without
and then with activation checkpointing → the first whose peak fits the GPU → `Choice`, with the
reason. What the configuration sets itself is kept, and only looked at.
"""

from __future__ import annotations

from dataclasses import dataclass

from medtrain.config import RunConfig
from medtrain.config.training import Strategy
from medtrain.memory.architecture import Architecture
from medtrain.memory.estimate import GIB, Estimate, estimate
from medtrain.memory.work import work_of

CHEAPEST_FIRST: tuple[Strategy, ...] = ("ddp", "zero2", "zero3", "zero3-offload")
"""What `auto` chooses from; one GPU has nobody to share with."""


@dataclass(frozen=True, slots=True)
class Choice:
    """How a stage is to run, and why."""

    strategy: Strategy
    checkpointing: bool
    fits: bool
    """Whether the estimate stays within the GPU; also true where nobody can tell."""
    reason: str
    """A sentence for a person; where it does not fit, with what to change."""
    estimate: Estimate | None = None
    """None where the size of the base is not known, or there is no GPU."""


def choose_strategy(
    config: RunConfig,
    stage: str,
    *,
    gpus: int,
    gpu_bytes: int,
    architecture: Architecture | None,
    auto_bytes: int = 2,
) -> Choice:
    """The strategy and the checkpointing of a training stage.

    Args:
        config: `train.strategy`, and the stage's `activation_checkpointing`, are kept if not auto.
        stage: `sft` or `dpo`.
        gpus: on all nodes together; 0 for a CPU.
        gpu_bytes: memory of one of them.
        architecture: of the base; None where it is not known.
        auto_bytes: bytes of a number where `model.dtype` is `auto`: 4 on a GPU without bfloat16.
    """
    set_one = config.train.strategy
    wanted = (config.dpo if stage == "dpo" else config.sft).activation_checkpointing
    if gpus < 1 or gpu_bytes < 1 or architecture is None:
        return _unestimated(set_one, wanted, gpus)
    tried = tried_estimates(config, stage, gpus, architecture, auto_bytes)
    for one in tried:
        if one.peak <= gpu_bytes:
            return Choice(one.strategy, one.checkpointing, True, _why(one, tried, gpu_bytes), one)
    smallest = min(tried, key=lambda one: one.peak)
    reason = _too_large(config, stage, smallest, gpu_bytes, gpus)
    return Choice(smallest.strategy, smallest.checkpointing, False, reason, smallest)


def tried_estimates(
    config: RunConfig, stage: str, gpus: int, architecture: Architecture, auto_bytes: int = 2
) -> list[Estimate]:
    """Everything that may be chosen, the cheapest first."""
    wanted = (config.dpo if stage == "dpo" else config.sft).activation_checkpointing
    strategies = CHEAPEST_FIRST if gpus > 1 else CHEAPEST_FIRST[:1]
    if config.train.strategy != "auto":
        strategies = (config.train.strategy,)
    work = work_of(config, stage, architecture, auto_bytes=auto_bytes)
    return [
        estimate(architecture, work, strategy, gpus=gpus, checkpointing=checkpointing)
        for strategy in strategies
        for checkpointing in ((False, True) if wanted == "auto" else (wanted,))
    ]


def _unestimated(set_one: str, wanted: bool | str, gpus: int) -> Choice:
    strategy: Strategy = "ddp" if set_one == "auto" else set_one  # type: ignore[assignment]
    if gpus < 1:
        reason = "there is no GPU"
    else:
        reason = "the size of the base is not known, so nothing is estimated"
    # Without an estimate, a GPU is given the slower way that needs less.
    checkpointing = gpus > 0 if wanted == "auto" else bool(wanted)
    return Choice(strategy, checkpointing, True, f"{_named(strategy, checkpointing)}: {reason}")


def _why(chosen: Estimate, tried: list[Estimate], gpu_bytes: int) -> str:
    said = f"{_named(chosen.strategy, chosen.checkpointing)} needs {gib(chosen.peak)}"
    before = tried[: tried.index(chosen)]
    if before:
        nearest = before[-1]
        said += (
            f"; {_named(nearest.strategy, nearest.checkpointing)} would need "
            f"{gib(nearest.peak)}"
        )
    return f"{said} of {gib(gpu_bytes)}"


def _too_large(
    config: RunConfig, stage: str, smallest: Estimate, gpu_bytes: int, gpus: int
) -> str:
    said = (
        f"{_named(smallest.strategy, smallest.checkpointing)} needs {gib(smallest.peak)} of "
        f"{gib(gpu_bytes)}"
    )
    if gpus > 1 or config.train.strategy != "auto":
        said += ", and nothing that may be chosen needs less"
    return f"{said}: {', or '.join(_remedies(config, stage, smallest, gpu_bytes, gpus))}"


def _remedies(
    config: RunConfig, stage: str, smallest: Estimate, gpu_bytes: int, gpus: int
) -> list[str]:
    """What to lower, the most telling first."""
    section = config.dpo if stage == "dpo" else config.sft
    found = []
    step = max(smallest.logits, smallest.temporary) + smallest.activations
    if smallest.evaluation > step and section.eval_batch_size > 1:
        found.append(f"lower {stage}.eval_batch_size (now {section.eval_batch_size})")
    elif section.batch_size > 1:
        found.append(
            f"halve {stage}.batch_size (now {section.batch_size}) and double "
            f"{stage}.gradient_accumulation (now {section.gradient_accumulation})"
        )
    else:
        found.append(f"lower {stage}.max_length (now {section.max_length})")
    if config.model.quantization != "nf4":
        found.append("set model.quantization=nf4")
    if section.activation_checkpointing is False:
        found.append(f"set {stage}.activation_checkpointing=auto")
    if config.train.strategy != "auto":
        found.append("set train.strategy=auto")
    if smallest.load > gpu_bytes or gpus == 1 or smallest.resident > 0.8 * gpu_bytes:
        found.append("take a GPU with more memory")
    return found


def _named(strategy: str, checkpointing: bool) -> str:
    return f"{strategy} with activation checkpointing" if checkpointing else strategy


def gib(size: float) -> str:
    """Bytes for a person."""
    return f"{size / GIB:,.1f} GiB"
