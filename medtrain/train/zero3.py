"""What ZeRO-3 has to be told of PEFT's layers of new tokens.

DeepSpeed gathers a module's own weights for the time of its forward pass. PEFT's token layers use
the embedding inside them, and TRL's losses multiply by the output layer without calling it, which
may be the same weight: neither is gathered then. These weights stay whole in every process.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.trainable_tokens import TrainableTokensLayer
from trl.trainer import utils as trl_utils


def keep_token_layers_whole(model: Any) -> None:
    """Gather the weights below PEFT's token layers, once and for all; a collective operation.

    Args:
        model: prepared by DeepSpeed, its parameters sharded.
    """
    layers = [m for m in model.modules() if isinstance(m, TrainableTokensLayer)]
    weights = {id(weight): weight for weight in (m.get_base_layer().weight for m in layers)}
    for weight in weights.values():
        weight.ds_persist = True
        weight.all_gather([weight])
    if weights:
        _leave_whole_weights_alone()


def _leave_whole_weights_alone() -> None:
    """TRL asks every weight of the output layer how it is sharded; a merged one is no parameter."""
    gather = trl_utils.maybe_gather_lm_head_ctx

    def gather_sharded(*weights: Any) -> Any:
        return gather(*(weight for weight in weights if hasattr(weight, "ds_status")))

    trl_utils.maybe_gather_lm_head_ctx = gather_sharded
