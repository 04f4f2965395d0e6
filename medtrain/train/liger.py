"""Liger's fused layer kernels (https://github.com/linkedin/Liger-Kernel): whether, and on what.

TRL's trainers put them on the model that they train. DPO's reference is computed by no trainer, and
gets the same ones here, so that both sides of a pair round alike. The output layer stays TRL's.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from medtrain.config import RunConfig
from medtrain.errors import ConfigError


def uses_liger(config: RunConfig) -> bool:
    """Whether Liger's kernels are used: as told, or where there is a GPU and they are installed.

    Raises:
        ConfigError: they are wanted where there is no GPU.
    """
    wanted, installed = config.train.liger, importlib.util.find_spec("liger_kernel") is not None
    if wanted is True and not torch.cuda.is_available():
        raise ConfigError(
            "train.liger=true needs a GPU", fix="Leave train.liger at auto: it is off on a CPU."
        )
    return bool(wanted) and installed and torch.cuda.is_available()


def put_liger_on(model: Any) -> None:
    """Give the layers of a model of transformers Liger's kernels, as a trainer would."""
    from transformers.integrations.liger import apply_liger_kernel

    apply_liger_kernel(model, {"fused_linear_cross_entropy": False})
