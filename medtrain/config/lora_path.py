"""Whether a run's settings let adapters be computed together with their base layers.

The answer for logs and plans, and for what must agree between policy and reference, without a model
at hand; medtrain.train.fused_lora looks at the model's layers.
"""

from __future__ import annotations

from medtrain.config.tree import RunConfig
from medtrain.errors import ConfigError

_SHARDED = ("zero3", "zero3-offload", "fsdp2")


def why_not_fused(config: RunConfig, strategy: str) -> str | None:
    """Why PEFT's own path is taken for all adapters; None where the fused one is tried.

    Args:
        config: the run's.
        strategy: that training is launched with, or `auto` where nobody knows yet.

    Raises:
        ConfigError: `train.fused_lora` is true, and something speaks against it.
    """
    if config.train.fused_lora is False:
        return "train.fused_lora is false"
    why = _what_speaks_against_it(config, strategy)
    if why is not None and config.train.fused_lora is True:
        raise not_possible(why)
    return why


def not_possible(why: str) -> ConfigError:
    """What a user is told whose `train.fused_lora: true` cannot be."""
    return ConfigError(
        f"train.fused_lora=true is not possible: {why}",
        fix="Set train.fused_lora=auto: adapters are then computed by PEFT where they must be.",
    )


def _what_speaks_against_it(config: RunConfig, strategy: str) -> str | None:
    if config.sft.lora.dora:
        return "sft.lora.dora needs the norms of whole weights"
    if config.train.compile is True:
        return "train.compile makes kernels of PEFT's own path"
    if strategy in _SHARDED:
        return f"{strategy} gathers weights layer by layer, as PEFT calls them"
    return None
