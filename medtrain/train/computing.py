"""What a stage computes with, for a run's log and for whom it is slow."""

from __future__ import annotations

from typing import Any

import torch

from medtrain.attention.choice import KERNELS
from medtrain.attention.packed import kernel_of
from medtrain.config import RunConfig
from medtrain.console import Console
from medtrain.train.checkpoints import Plan
from medtrain.train.model import compute_dtype


def tell_attention(model: Any, stage: str, console: Console, *, packed: bool) -> None:
    """Write down how rows of a stage attend; warn where a GPU is left with the slow way.

    Args:
        model: of transformers, loaded for the stage.
        stage: for the log.
        console: whose log it is.
        packed: whether rows lie in one sequence.

    Raises:
        ConfigError: what `model.attention` asks for does not work here.
    """
    if not packed:
        console.log_only(
            "attention", stage=stage, packed=False, by=str(model.config._attn_implementation)
        )
        return
    kernel, reason, surprising = kernel_of(model)
    console.log_only("attention", stage=stage, packed=True, by=kernel, reason=reason)
    if surprising:
        console.warn(
            "attention_failed",
            f"{stage}: packed rows attend by {kernel}, since a better kernel does not work on this "
            f"GPU: {reason}",
            stage=stage,
        )
    elif kernel == "rows" and model.device.type == "cuda":
        console.warn(
            "attention_slow",
            f"{stage}: packed rows attend one after another ({reason}), which costs a GPU time; "
            f"{KERNELS['varlen']} needs PyTorch 2.10 and 16 bits",
            stage=stage,
        )


def tell_waits(settings: Any, plan: Plan, stage: str, console: Console) -> None:
    """Write down whether the host waits for the device in every step (medtrain.train.ahead).

    Args:
        settings: TRL's configuration of the stage.
        plan: of its steps.
        stage: for the log.
        console: whose log it is.
    """
    optimizer = str(getattr(settings.optim, "value", settings.optim))
    reasons = {
        "computed on a CPU": settings.device.type != "cuda",
        f"{plan.strategy} waits by itself": plan.strategy != "ddp",
        "float16 scales its losses": settings.fp16,
        f"{optimizer} cannot leave a step out by itself": "fused" not in optimizer,
    }
    why = next((reason for reason, holds in reasons.items() if holds), "")
    console.log_only("steps", stage=stage, wait_for_the_device=bool(why), reason=why)


def warn_of_float32(config: RunConfig, stage: str, console: Console) -> None:
    """Say it where `model.dtype: auto` leaves a GPU's tensor cores idle.

    Args:
        config: the run's.
        stage: for the log.
        console: whose log it is.
    """
    automatic = config.model.dtype == "auto"
    if automatic and torch.cuda.is_available() and compute_dtype(config) == torch.float32:
        console.warn(
            "computes_in_float32",
            f"{stage}: this GPU has no bfloat16, so model.dtype=auto computes in float32, several "
            "times slower than in 16 bits: set model.dtype=float16",
            stage=stage,
        )
