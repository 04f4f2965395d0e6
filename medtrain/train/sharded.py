"""What DeepSpeed has to be told of adapters, and ZeRO-3 of PEFT's layers of new tokens.

DeepSpeed gathers a module's own weights for the time of its forward pass. PEFT's token layers use
the embedding inside them, and TRL's losses multiply by the output layer without calling it, which
may be the same weight: neither is gathered then. These weights stay whole in every process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.trainable_tokens import layer as token_layers
from trl.trainer import utils as trl_utils


def fit_buckets(plugin: Any, model: Any) -> None:
    """Make DeepSpeed's buckets for gradients as large as an adapter's are at most.

    They are laid out beforehand, for 500 million numbers unless told otherwise: 2 GB.

    Args:
        plugin: accelerate's, before DeepSpeed is initialised.
        model: tells how many numbers are trained.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    zero = plugin.deepspeed_config["zero_optimization"]
    zero["reduce_bucket_size"] = zero["allgather_bucket_size"] = max(trained, 1)


def do_without_compiled_op() -> None:
    """Have DeepSpeed compile nothing on a CPU: it would use the op in inference alone.

    Compiling takes half a minute and a compiler; and a process that is killed meanwhile leaves a
    mark, for whose end all others would wait for ever.
    """
    from deepspeed import ops
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False


def keep_token_layers_whole(model: Any) -> None:
    """Take the weights below PEFT's token layers out of what DeepSpeed shards.

    They are frozen, so that nothing is lost by their being buffers, which it leaves alone.

    Args:
        model: not prepared by DeepSpeed yet.
    """
    for module in model.modules():
        if isinstance(module, TrainableTokensLayer):
            layer = module.get_base_layer()
            weight = layer.weight.detach()
            del layer.weight
            layer.register_buffer("weight", weight, persistent=False)


@contextmanager
def still_whole() -> Iterator[None]:
    """While TRL makes a trainer, DeepSpeed is known of and the model is not sharded yet.

    TRL adds an adapter then, and PEFT would gather what is not scattered, on a GPU if need be.
    """
    known = token_layers.check_deepspeed_zero3_enabled
    token_layers.check_deepspeed_zero3_enabled = lambda: False
    try:
        yield
    finally:
        token_layers.check_deepspeed_zero3_enabled = known


def let_trl_meet_merged_weights() -> None:
    """TRL asks the output layer's weight how it is sharded; a merged one is no parameter."""
    gather = trl_utils.maybe_gather_lm_head_ctx
    if getattr(gather, "meets_merged_weights", False):
        return

    def gather_sharded(*weights: Any) -> Any:
        return gather(*(weight for weight in weights if hasattr(weight, "ds_status")))

    gather_sharded.meets_merged_weights = True  # type: ignore[attr-defined]
    trl_utils.maybe_gather_lm_head_ctx = gather_sharded
