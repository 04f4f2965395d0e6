"""Attention of one new token a row over its slot, in transformers' interface.

The query heads that share a key head are laid along the length instead of repeating the keys, as if
they were so many tokens: keys and values are read once. Which positions a row sees is in the masks
of the slots, made once a step; a model in whose interface this function stands makes none itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from medtrain.generate.slots.cache import SlotCache

NAME = "medtrain_slots"
_NOT_KNOWN_HERE = ("position_bias", "s_aux")
"""What some models add to their scores: biases, sinks."""
_in_use: list[SlotCache] = []


class UnknownAttentionError(Exception):
    """A model's attention does something that is not computed here."""


@contextmanager
def slots_in_use(model: Any, cache: SlotCache) -> Iterator[None]:
    """Have every attention of a model look at slots while the block lasts."""
    configs = _configs(model)
    before = [config._attn_implementation for config in configs]
    _in_use.append(cache)
    try:
        for config in configs:
            config._attn_implementation_internal = NAME
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name
        _in_use.pop()


def _configs(model: Any) -> list[Any]:
    """The configurations that a model's attentions ask, each once."""
    configs = {id(model.config): model.config}
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            configs[id(module.config)] = module.config
    return list(configs.values())


def slot_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """One token a slot.

    Args:
        module: the attention layer; its `layer_idx` says which mask.
        query: (slots, heads, 1, head size).
        key: (slots, key heads, length, head size), the whole slots.
        value: (slots, key heads, length, its head size).
        attention_mask: none; the slots have their own.
        scaling: of the scores; None for one over the root of the head size.
        softcap: of the scores, as in Gemma 2.
        options: what else models hand on; windows are in the masks.

    Returns:
        (slots, 1, heads, value head size), and no weights.

    Raises:
        UnknownAttentionError: the model adds something to its scores.
    """
    unknown = [name for name in _NOT_KNOWN_HERE if options.get(name) is not None]
    if unknown or query.shape[2] != 1:
        raise UnknownAttentionError(
            f"its attention has {', '.join(unknown) or 'a form of its own'}"
        )
    cache = _in_use[-1]
    slots, heads, _, head_size = query.shape
    mask = cache.masks[cache.layers[module.layer_idx].window].to(query.dtype)
    query = query.reshape(slots, key.shape[1], heads // key.shape[1], head_size)
    if softcap is None:
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    else:
        out = _softcapped(query, key, value, mask, scaling or head_size**-0.5, softcap)
    return out.reshape(slots, 1, heads, value.shape[-1]), None


def _softcapped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, softcap: float
) -> Tensor:
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    scores = torch.tanh(scores / softcap) * softcap + mask
    return torch.matmul(scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype), value)


AttentionInterface.register(NAME, slot_attention)
