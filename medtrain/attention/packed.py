"""What transformers calls for the attention of packed rows, and of padded ones.

A pass of packed rows brings their borders as keyword arguments, and a mask of one element as the
sign that it is one; transformers takes a mask of four dimensions as it is, so nobody looks
at positions for it. An attention that the sign reaches and the borders do not belongs to a model
whose layers lose keyword arguments: that is an error, since it would see neighbours. Padded rows
have transformers' own mask and are computed by its own function.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from medtrain.attention.choice import Choice, Wanted
from medtrain.attention.kernels import Rows, attend_by
from medtrain.attention.trial import Shape, settled
from medtrain.errors import MedtrainError

PACKED_ATTENTION: dict[Wanted, str] = {
    "auto": "medtrain_packed",
    "sdpa": "medtrain_packed_sdpa",
    "flash_attention_2": "medtrain_packed_flash",
}
"""Names under which transformers knows it, by `model.attention`."""
_SIGN = (1, 1, 1, 1)
"""The shape of the mask that says that rows are packed."""
_NOT_COMPUTED = ("dropout", "softcap", "s_aux", "position_bias")
"""What an attention may want beside the scale and a window."""


def attention_for(wanted: str, *, packed: bool) -> str | None:
    """The attention implementation to load a model with; None lets transformers choose.

    Args:
        wanted: `model.attention`.
        packed: rows lie in one sequence; `eager` cannot do that.
    """
    if not packed:
        return None if wanted == "auto" else wanted
    return {str(name): known for name, known in PACKED_ATTENTION.items()}[wanted]


@contextmanager
def computing_packed(model: Any, wanted: str) -> Iterator[None]:
    """Let a model that was loaded for other work keep rows apart for a while.

    Args:
        model: of a family that can.
        wanted: `model.attention`.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation(attention_for(wanted, packed=True))
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def borders_of(packed: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments by which a pass says that its rows are packed.

    Args:
        packed: what medtrain.train.packed.pack gives, on the model's device.
    """
    return {
        "attention_mask": packed["borders"].new_zeros(_SIGN, dtype=torch.bool),
        "row_lengths": packed["row_lengths"],
        "row_borders": packed["borders"],
    }


def kernel_of(model: Any) -> Choice:
    """The kernel that packed rows of a model are computed with; tried where it is on a GPU.

    Args:
        model: of transformers, loaded with one of `PACKED_ATTENTION`.

    Raises:
        MedtrainError: none of those that `model.attention` admits works here.
    """
    config = model.config.get_text_config()
    heads = int(config.num_attention_heads)
    shape = Shape(
        device=model.device,
        dtype=model.dtype,
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        windowed=window_of(config) is not None,
    )
    choice: Choice = settled(shape, _wanted(config._attn_implementation))
    return choice


def window_of(config: Any) -> int | None:
    """Tokens that a token of the model attends to, itself included; None for all before it."""
    if not getattr(config, "use_sliding_window", True):
        return None
    window: int | None = getattr(config, "sliding_window", None)
    return window


def _wanted(implementation: str) -> Wanted:
    return next(w for w, name in PACKED_ATTENTION.items() if name == implementation)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    row_lengths: tuple[int, ...] | None = None,
    row_borders: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """(1, heads, tokens, head size) → (1, tokens, heads, head size); see transformers'
    AttentionInterface.

    Raises:
        MedtrainError: the rows' borders were lost, or the model wants what no kernel computes.
    """
    if row_lengths is None or row_borders is None:
        _refuse_lost_borders(module, attention_mask)
        attended: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return attended
    _refuse_extras(module, {**kwargs, "dropout": dropout or None})
    query, key, value = _as_computed(query, key, value)
    shape = Shape(
        query.device,
        query.dtype,
        query.shape[1],
        key.shape[1],
        query.shape[-1],
        sliding_window is not None,
    )
    choice = settled(shape, _wanted(module.config._attn_implementation))
    rows = Rows(tuple(row_lengths), row_borders)
    window = sliding_window if sliding_window and rows.longest > sliding_window else None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend_by(choice.kernel)(query, key, value, rows, scale, window), None


def _as_computed(*parts: Tensor) -> list[Tensor]:
    """In the precision that autocast asks for: not every kernel is one that it knows."""
    device = parts[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(parts)
    dtype = torch.get_autocast_dtype(device)
    return [part.to(dtype) for part in parts]


def _refuse_lost_borders(module: Any, mask: Tensor | None) -> None:
    if mask is not None and tuple(mask.shape) == _SIGN:
        raise MedtrainError(
            f"{type(module).__name__} was given packed rows without their borders, and would have "
            "attended to neighbours",
            fix="Set sft.packing=false and dpo.packing=false: this kind of model does not hand "
            "keyword arguments on to its attention.",
        )


def _refuse_extras(module: Any, wanted: Mapping[str, Any]) -> None:
    unknown = sorted(name for name in _NOT_COMPUTED if wanted.get(name) is not None)
    if unknown:
        raise MedtrainError(
            f"{type(module).__name__} asks for {', '.join(unknown)}, which attention over packed "
            "rows does not compute",
            fix="Set sft.packing=false and dpo.packing=false.",
        )


for _name in PACKED_ATTENTION.values():
    AttentionInterface.register(_name, _attention)
    AttentionMaskInterface.register(_name, sdpa_mask)
