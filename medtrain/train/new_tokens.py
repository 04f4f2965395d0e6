"""The trained rows of new tokens, put into their matrix without a wait.

PEFT's layer of trainable tokens → the same with the rows' numbers kept where the weights are. PEFT
makes them anew from a list in every pass, and copies them to the GPU, for which the host waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor


def keep_token_numbers(model: Any) -> None:
    """Let a PeftModel's layers of trainable tokens keep their rows' numbers on the device."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    for layer in model.modules():
        if isinstance(layer, TrainableTokensLayer):
            layer._medtrain_numbers = {}
            for name in layer.token_indices:
                _numbers(layer, name, layer.base_layer.weight.device)
            layer.get_merged_weights = MethodType(_merged_weights, layer)


def _merged_weights(layer: Any, active_adapters: Sequence[str]) -> Tensor:
    """(rows, hidden): the base's matrix with the trained rows in it, in its own dtype."""
    weight: Tensor = layer.base_layer.weight
    for name in active_adapters:
        rows = layer.trainable_tokens_delta[name].to(weight)
        weight = weight.index_copy(0, _numbers(layer, name, weight.device), rows)
    return weight


def _numbers(layer: Any, name: str, device: torch.device) -> Tensor:
    """(rows,) int64, which rows of the matrix an adapter has."""
    kept: dict[tuple[str, torch.device], Tensor] = layer._medtrain_numbers
    if (name, device) not in kept:
        kept[name, device] = torch.tensor(layer.token_indices[name], device=device)
    return kept[name, device]
