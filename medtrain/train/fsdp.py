"""What FSDP2 has to be told of adapters: in which numbers to compute, and how to make one whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from medtrain.errors import ConfigError
from medtrain.train.adapter import trainable_parameters


def refuse_new_tokens(new_token_ids: Sequence[int]) -> None:
    """Refuse what fails in the first forward pass, before a base is loaded for it.

    Raises:
        ConfigError: rows of new tokens are to be trained.
    """
    if new_token_ids:
        raise ConfigError(
            f"train.strategy fsdp2 cannot train the rows of {len(new_token_ids)} new tokens: PEFT "
            "has no layer for them whose base is sharded by FSDP2",
            fix="Set train.strategy=zero3 (or auto), or a model.chat_template whose tokens the "
            "base knows.",
        )


def compute_in(plugin: Any, dtype: torch.dtype) -> None:
    """Compute in `dtype`, but sum gradients and give losses in float32.

    accelerate would have all three in `dtype`: a loss of three digits in bfloat16.

    Args:
        plugin: accelerate's, before the model is prepared.
        dtype: of the base.
    """
    plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=torch.float32
    )


def whole_weights(model: Any) -> dict[str, torch.Tensor]:
    """The trained weights, gathered. A collective operation; the frozen base stays where it is."""
    return {
        name: parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
        for name, parameter in trainable_parameters(model)
    }
