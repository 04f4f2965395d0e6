"""Which strategy a training stage runs with: the cheapest that fits.

estimates of replicated weights, ZeRO-2, ZeRO-3 and offloaded ZeRO-3, in this order, each without
and then with activation checkpointing → the first whose peak fits the GPU → `Choice`, with the
reason. What the configuration sets itself is kept, and only looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from medtrain.config import RunConfig
from medtrain.config.training import Strategy
from medtrain.memory.architecture import Architecture
from medtrain.memory.estimate import GIB, Estimate, estimate
from medtrain.memory.work import Work, optimizers_of, work_of

CHEAPEST_FIRST: tuple[Strategy, ...] = ("ddp", "zero2", "zero3", "zero3-offload")
"""What `auto` chooses from; one GPU has nobody to share with."""


COUNTED_ON = 0.95
"""Of a GPU's memory. What takes more is chosen only where nothing takes less: an estimate that is a
little too low would end a training."""
_NO_NEW_TOKENS = (
    "fsdp2 cannot train the rows of the chat format's new tokens: set train.strategy=zero3 or auto"
)


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
    optimizer: str | None = None
    """What it was estimated with; None where nothing was."""


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
    if set_one == "fsdp2" and work_of(config, stage, architecture).new_rows:
        return Choice("fsdp2", False, False, _NO_NEW_TOKENS)
    section = config.dpo if stage == "dpo" else config.sft
    optimizers = optimizers_of(config, section.optimizer, "cuda")
    by_optimizer = [
        tried_estimates(config, stage, gpus, architecture, auto_bytes, name) for name in optimizers
    ]
    # Smaller moments before a slower strategy, or activations that are computed twice.
    best_first = [
        (optimizer, tried, one)
        for alike in zip(*by_optimizer, strict=True)
        for optimizer, tried, one in zip(optimizers, by_optimizer, alike, strict=True)
    ]
    for share in (COUNTED_ON, 1.0):
        for optimizer, tried, one in best_first:
            if one.peak <= share * gpu_bytes:
                why = _why(one, tried, gpu_bytes)
                return Choice(one.strategy, one.checkpointing, True, why, one, optimizer)
    optimizer, tried = optimizers[-1], by_optimizer[-1]
    smallest = min(tried, key=lambda one: one.peak)
    reason = _too_large(config, stage, smallest, gpu_bytes)
    return Choice(smallest.strategy, smallest.checkpointing, False, reason, smallest, optimizer)


def tried_estimates(
    config: RunConfig,
    stage: str,
    gpus: int,
    architecture: Architecture,
    auto_bytes: int = 2,
    optimizer: str | None = None,
) -> list[Estimate]:
    """Everything that may be chosen with an optimiser, the cheapest first."""
    wanted = (config.dpo if stage == "dpo" else config.sft).activation_checkpointing
    strategies = CHEAPEST_FIRST if gpus > 1 else CHEAPEST_FIRST[:1]
    if config.train.strategy != "auto":
        strategies = (config.train.strategy,)
    work = work_of(config, stage, architecture, auto_bytes=auto_bytes, optimizer=optimizer)
    return [
        estimate(architecture, work, strategy, gpus=gpus, checkpointing=checkpointing)
        for strategy in strategies
        for checkpointing in _ways(wanted)
    ]


def choose_under(
    config: RunConfig,
    stage: str,
    strategy: Strategy,
    *,
    gpus: int,
    gpu_bytes: int,
    architecture: Architecture | None,
    auto_bytes: int = 2,
) -> Choice:
    """Checkpointing and optimiser of a stage under a strategy that is settled already.

    The arguments are those of `choose_strategy`, and with the strategy that it chose so is the
    answer.
    """
    kept = config.model_copy(
        update={"train": config.train.model_copy(update={"strategy": strategy})}
    )
    return choose_strategy(
        kept,
        stage,
        gpus=gpus,
        gpu_bytes=gpu_bytes,
        architecture=architecture,
        auto_bytes=auto_bytes,
    )


def strategies_for(
    architecture: Architecture,
    work: Work,
    *,
    gpus: int,
    gpu_bytes: int,
    checkpointing: bool | Literal["auto"],
) -> list[Estimate]:
    """An estimate of every strategy, with checkpointing only where it does not fit without.

    FSDP2 trains no rows of new tokens.
    """
    found = []
    sharding: tuple[Strategy, ...] = CHEAPEST_FIRST if work.new_rows else (*CHEAPEST_FIRST, "fsdp2")
    for strategy in sharding if gpus > 1 else sharding[:1]:
        ways = [
            estimate(architecture, work, strategy, gpus=gpus, checkpointing=way)
            for way in _ways(checkpointing)
        ]
        found.append(next((way for way in ways if way.peak <= gpu_bytes), ways[-1]))
    return found


def _ways(wanted: bool | Literal["auto"]) -> tuple[bool, ...]:
    return (False, True) if wanted == "auto" else (wanted,)


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
            f"; {_named(nearest.strategy, nearest.checkpointing)} would need {gib(nearest.peak)}"
        )
    return f"{said} of {gib(gpu_bytes)}"


def _too_large(config: RunConfig, stage: str, smallest: Estimate, gpu_bytes: int) -> str:
    said = f"{_named(smallest.strategy, smallest.checkpointing)} needs {gib(smallest.peak)} of "
    if smallest.load > gpu_bytes:
        return (
            f"{said}{gib(gpu_bytes)} to load the base, which every GPU holds whole before it is "
            "sharded: take GPUs with more memory, or a smaller base"
        )
    remedies = ", or ".join(_remedies(config, stage, smallest, gpu_bytes))
    return f"{said}{gib(gpu_bytes)}, and nothing that may be chosen needs less: {remedies}"


def _remedies(config: RunConfig, stage: str, smallest: Estimate, gpu_bytes: int) -> Iterator[str]:
    """What to lower, the most telling first."""
    section = config.dpo if stage == "dpo" else config.sft
    if section.activation_checkpointing is False:
        yield f"set {stage}.activation_checkpointing=auto"
    if config.model.quantization != "nf4":
        yield "set model.quantization=nf4"
    if config.train.strategy != "auto":
        yield "set train.strategy=auto"
    step = smallest.activations + max(smallest.logits + smallest.new_rows, smallest.temporary)
    if smallest.evaluation > step and section.eval_batch_size > 1:
        yield f"lower {stage}.eval_batch_size (now {section.eval_batch_size})"
    elif section.batch_size > 1:
        yield (
            f"halve {stage}.batch_size (now {section.batch_size}) and double "
            f"{stage}.gradient_accumulation (now {section.gradient_accumulation})"
        )
    else:
        yield f"lower {stage}.max_length (now {section.max_length})"
    if smallest.resident > 0.5 * gpu_bytes:
        yield "take GPUs with more memory"


def _named(strategy: str, checkpointing: bool) -> str:
    return f"{strategy} with activation checkpointing" if checkpointing else strategy


def gib(size: float) -> str:
    """Bytes for a person."""
    return f"{size / GIB:,.1f} GiB"
