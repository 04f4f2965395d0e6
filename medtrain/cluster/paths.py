"""By which paths a training stage will compute, as far as that is known before it runs.

configuration + GPU + sizes of the base → how rows attend (medtrain.attention), how adapters are
computed (medtrain.config.lora_path), with which optimiser. On the GPU itself a kernel is tried
before it is trusted; the stage's log says what came of it.
"""

from __future__ import annotations

from typing import NamedTuple

from medtrain.attention import Facts, choose, installed_facts
from medtrain.attention.choice import KERNELS, Wanted
from medtrain.attention.families import FAMILIES
from medtrain.config import RunConfig
from medtrain.config.lora_path import why_not_fused
from medtrain.gpus import Gpu
from medtrain.memory import Architecture, Choice
from medtrain.memory.work import FUSED
from medtrain.run import Trained


class Paths(NamedTuple):
    """What a stage computes with, in words."""

    attention: str
    lora: str
    optimizer: str


def paths_of(
    config: RunConfig,
    stage: Trained,
    gpu: Gpu | None,
    architecture: Architecture | None,
    choice: Choice,
) -> Paths:
    """The paths of a training stage.

    Args:
        config: the run's.
        stage: whose section says how.
        gpu: that it gets; None for a CPU.
        architecture: of the base; None where it is not known.
        choice: its strategy.
    """
    return Paths(
        _attention(config, stage, gpu, architecture),
        _lora(config, choice.strategy),
        _optimizer(config, stage, gpu, choice),
    )


def _attention(
    config: RunConfig, stage: Trained, gpu: Gpu | None, architecture: Architecture | None
) -> str:
    section, wanted = getattr(config, stage), config.model.attention
    if section.packing is False or wanted == "eager":
        why = "packing is off" if section.packing is False else "model.attention is eager"
        return f"padded rows ({why})"
    if architecture is None:
        return "chosen when the base is loaded"
    if architecture.kind not in FAMILIES:
        return f"padded rows ({architecture.kind} is not known to keep packed ones apart)"
    asked: Wanted = wanted
    choices = choose(_facts(config, gpu, architecture), asked)
    if not choices:
        return f"packed rows, but {wanted} is not to be had"
    best = choices[0]
    return f"packed rows, {best.kernel}: {KERNELS[best.kernel]}" + (
        f" ({best.reason})" if best.reason else ""
    )


def _facts(config: RunConfig, gpu: Gpu | None, architecture: Architecture) -> Facts:
    sizes = {"float32": 4, "bfloat16": 2, "float16": 2}
    automatic = gpu.auto_bytes if gpu else 4
    return installed_facts(
        gpu.capability if gpu else None,
        sizes.get(config.model.dtype, automatic),
        architecture.head_dim,
    )


def _lora(config: RunConfig, strategy: str) -> str:
    why = why_not_fused(config, strategy)
    return "fused with the base layers" if why is None else f"PEFT's own path ({why})"


def _optimizer(config: RunConfig, stage: Trained, gpu: Gpu | None, choice: Choice) -> str:
    named: str = getattr(config, stage).optimizer
    if named != "auto":
        return named
    if gpu is None or choice.strategy == "fsdp2":
        return "adamw_torch"
    chosen = choice.optimizer or FUSED
    return "adamw_torch" if chosen == FUSED and choice.strategy != "ddp" else chosen
