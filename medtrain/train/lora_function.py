"""Linear layers that read one tensor, and their adapters, as one function of autograd.

x → dropped once for all of them → h = drop(x) [A₁ A₂ …]ᵀ, one product → for each layer its base
product, into which s·hBᵀ is added by the product itself. Backward: h's gradient, those of all A
and B, and x's in one tensor, to which every base weight adds its share. The base stays as it is
stored; 4-bit weights are dequantised again for the backward pass, one at a time.

An adapter's output is never held, scaled or added by itself, and its input is cast once: on a GPU
these passes over activations cost as much as the matrix products. With LoRA's dropout the layers
share one mask. That changes which numbers are drawn, and not the method: each adapter still sees
its input with every element dropped with probability p. (LoRA: https://arxiv.org/abs/2106.09685)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable


class Adapted(NamedTuple):
    """A linear layer with a frozen base and one adapter."""

    base: Any
    """nn.Linear, or bitsandbytes' Linear4bit."""
    scale: float
    """alpha / r, or alpha / sqrt(r) with rank stabilisation."""
    quantized: bool


class Setting(NamedTuple):
    """What all layers of a call share."""

    layers: tuple[Adapted, ...]
    dropout: float
    """Share of the input that is dropped; 0 outside training."""
    dtype: torch.dtype
    """Of computation: autocast's, or that of the input where there is no autocast."""


class AdaptedLayers(torch.autograd.Function):
    """`apply(setting, x, A₁, A₂, …, B₁, B₂, …)` gives a tuple: one output a layer.

    x is (..., inputs), Aᵢ (rᵢ, inputs), Bᵢ (outputsᵢ, rᵢ). It keeps, for the backward pass, x and h
    in the dtype of computation, dropout's mask, and the adapters in that dtype.
    """

    @staticmethod
    def forward(
        ctx: Any, setting: Setting, x: torch.Tensor, *weights: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Outputs as PEFT's layers have them, in the same dtype."""
        count = len(setting.layers)
        cast = x.to(setting.dtype)
        down, ups = _stacked(weights, count, setting.dtype)
        dropped, mask = _dropped(cast, setting.dropout)
        low = dropped.reshape(-1, x.shape[-1]) @ down.t()  # (tokens, all ranks)
        outputs = []
        for layer, up, part in zip(setting.layers, ups, _by_rank(low, ups), strict=True):
            output = layer.base(cast).contiguous()
            output.view(-1, output.shape[-1]).addmm_(part, up.t(), alpha=layer.scale)
            # A 4-bit layer answers in its input's dtype, a plain one in autocast's.
            outputs.append(output.to(x.dtype) if layer.quantized else output)
        ctx.save_for_backward(cast, mask, low, down, *ups)
        ctx.setting, ctx.input_dtype, ctx.weight_dtype = setting, x.dtype, weights[0].dtype
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x and of every A and B; None for layers whose output was not used."""
        # Once: activation checkpointing computes what was kept again, and hands it out once.
        x, mask, low, down, *ups = ctx.saved_tensors
        setting: Setting = ctx.setting
        used = [
            None if g is None else g.reshape(-1, g.shape[-1]).to(setting.dtype) for g in gradients
        ]
        d_low = _gradient_of_low(setting, used, low, ups)
        d_weights: Sequence[torch.Tensor | None] = [None] * (2 * len(ups))
        if any(ctx.needs_input_grad[2:]):
            flat = x.reshape(-1, x.shape[-1])
            # Dropped anew, and let go before x's gradient is made.
            d_weights = _weight_gradients(ctx, used, _masked(flat, mask, setting), d_low, low, ups)
        d_x = None
        if ctx.needs_input_grad[1]:
            d_x = _input_gradient(setting, used, d_low, down, mask)
            d_x = d_x.view(x.shape).to(ctx.input_dtype)
        return (None, d_x, *d_weights)


def _stacked(
    weights: Sequence[torch.Tensor], count: int, dtype: torch.dtype
) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """All A one above the other, (all ranks, inputs), and every B, in `dtype`.

    They are cast anew in each pass, by one launch: bitsandbytes' optimisers write weights without
    a trace by which an older copy could be told to be stale.
    """
    if all(weight.dtype == dtype for weight in weights):
        downs = weights[:count]
        return (downs[0] if count == 1 else torch.cat(tuple(downs))), weights[count:]
    copies = _places([weight.shape for weight in weights], weights[0], dtype)
    torch._foreach_copy_(copies, list(weights))
    ranks = sum(len(weight) for weight in weights[:count])
    stacked = copies[0].as_strided((ranks, weights[0].shape[1]), (weights[0].shape[1], 1))
    return stacked, copies[count:]


def _places(
    shapes: Sequence[torch.Size], beside: torch.Tensor, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Room for tensors of these shapes, one after the other in one stretch of memory."""
    room = beside.new_empty(sum(shape.numel() for shape in shapes), dtype=dtype)
    return _cut(room, shapes)


def _cut(room: torch.Tensor, shapes: Sequence[torch.Size]) -> list[torch.Tensor]:
    parts = room.split_with_sizes([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _by_rank(low: torch.Tensor, ups: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Each layer's own columns of (tokens, all ranks)."""
    return low.split_with_sizes([up.shape[1] for up in ups], dim=1)


def _dropped(x: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x with a share of its elements dropped and the others scaled up; and what undoes neither.

    As nn.Dropout does it on either device: a GPU keeps a byte an element, a CPU, where mixing
    dtypes costs more than memory does, the factors themselves.
    """
    if share == 0:
        return x, None
    if x.device.type == "cpu":
        factors = torch.empty_like(x).bernoulli_(1 - share).div_(1 - share)
        return x * factors, factors
    dropped, kept = torch.native_dropout(x, share, train=True)
    return dropped, kept


def _masked(values: torch.Tensor, mask: torch.Tensor | None, setting: Setting) -> torch.Tensor:
    """(tokens, inputs) times what dropout multiplied by: its backward pass, or it once more."""
    if mask is None:
        return values
    mask = mask.reshape(values.shape)
    if mask.dtype is not torch.bool:
        return values * mask
    scaled: torch.Tensor = torch.ops.aten.native_dropout_backward(
        values, mask, 1 / (1 - setting.dropout)
    )
    return scaled


def _gradient_of_low(
    setting: Setting,
    used: Sequence[torch.Tensor | None],
    low: torch.Tensor,
    ups: Sequence[torch.Tensor],
) -> torch.Tensor:
    """(tokens, all ranks), the scales in it."""
    whole = all(gradient is not None for gradient in used)
    result = torch.empty_like(low) if whole else torch.zeros_like(low)
    for layer, gradient, up, part in zip(
        setting.layers, used, ups, _by_rank(result, ups), strict=True
    ):
        if gradient is not None:
            part.addmm_(gradient, up, beta=0, alpha=layer.scale)
    return result


def _weight_gradients(
    ctx: Any,
    used: Sequence[torch.Tensor | None],
    dropped: torch.Tensor,
    d_low: torch.Tensor,
    low: torch.Tensor,
    ups: Sequence[torch.Tensor],
) -> list[torch.Tensor | None]:
    """Of every A, then of every B, in their own dtype; cast by one launch."""
    shapes = [torch.Size((low.shape[1], dropped.shape[1])), *(up.shape for up in ups)]
    d_down, *d_ups = _places(shapes, low, low.dtype)
    torch.mm(d_low.t(), dropped, out=d_down)
    for layer, gradient, part, d_up in zip(
        ctx.setting.layers, used, _by_rank(low, ups), d_ups, strict=True
    ):
        if gradient is not None:
            d_up.addmm_(gradient.t(), part, beta=0, alpha=layer.scale)
    d_down, *d_ups = _cast_together([d_down, *d_ups], ctx.weight_dtype)
    d_downs = d_down.split_with_sizes([up.shape[1] for up in ups])
    wanted = [gradient is not None for gradient in used] * 2
    return [
        one if is_wanted and needed else None
        for one, is_wanted, needed in zip(
            [*d_downs, *d_ups], wanted, ctx.needs_input_grad[2:], strict=True
        )
    ]


def _cast_together(parts: Sequence[torch.Tensor], dtype: torch.dtype) -> Sequence[torch.Tensor]:
    """Tensors of `_places` in another dtype."""
    if parts[0].dtype == dtype:
        return parts
    room = parts[0].as_strided((sum(part.numel() for part in parts),), (1,))
    return _cut(room.to(dtype), [part.shape for part in parts])


def _input_gradient(
    setting: Setting,
    used: Sequence[torch.Tensor | None],
    d_low: torch.Tensor,
    down: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """(tokens, inputs): what comes through the adapters, and to it each base's share."""
    result = _masked(d_low @ down, mask, setting)
    for layer, gradient in zip(setting.layers, used, strict=True):
        if gradient is not None:
            result.addmm_(gradient, _base_weight(layer, setting.dtype))
    return result


def _base_weight(layer: Adapted, dtype: torch.dtype) -> torch.Tensor:
    """(outputs, inputs), dequantised where it must be."""
    weight: torch.Tensor = layer.base.weight
    if layer.quantized:
        from bitsandbytes.functional import dequantize_4bit

        packed: Any = weight
        weight = dequantize_4bit(packed.data.view(-1, 1), packed.quant_state)
    return weight.to(dtype)
