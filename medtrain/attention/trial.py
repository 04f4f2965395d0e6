"""The kernel that really works here: each is tried once, and compared, before it is trusted.

kernels that should fit (medtrain.attention.choice) → the first whose outputs and gradients on a few
small rows are those of a row-by-row computation in float32 → `Settled`, with what was wrong with
those before it. A kernel can be missing from a build, or refuse a card, without saying so before.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from medtrain.attention.choice import Choice, Facts, Kernel, Wanted, choose, installed_facts
from medtrain.attention.kernels import Attend, Rows, attend_by, row_by_row
from medtrain.errors import ConfigError

_LENGTHS = (5, 64, 2, 33)
_TOLERANCE = {2: 2e-2, 4: 1e-4, 8: 1e-6}
"""Of the distance from float32's result, relative to that, by the bytes of a number."""


class Shape(NamedTuple):
    """What the attention of a model looks like to a kernel."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    """Of queries."""
    kv_heads: int
    """Of keys and values."""
    head_dim: int
    windowed: bool
    """Whether the model has an attention window."""


@torch.compiler.disable  # type: ignore[untyped-decorator]
def settled(shape: Shape, wanted: Wanted = "auto") -> Choice:
    """The kernel for a shape; tried on its device when it is first asked for.

    Raises:
        ConfigError: `wanted` leaves none that works.
    """
    return _settled(shape, wanted)


@lru_cache
def _settled(shape: Shape, wanted: Wanted) -> Choice:
    against: list[str] = []
    for choice in choose(facts_of(shape), wanted):
        problem = _problem(choice.kernel, shape)
        if problem is None:
            reason = ", ".join([*filter(None, [choice.reason]), *against])
            return Choice(choice.kernel, reason, surprising=bool(against))
        against.append(f"no {choice.kernel}: {problem}")
    raise ConfigError(
        f"model.attention={wanted} computes no packed rows here: "
        f"{', '.join(against) or 'flash-attn, a GPU it knows and 16 bits are needed'}",
        fix="Set model.attention=auto, or sft.packing=false and dpo.packing=false.",
    )


def facts_of(shape: Shape) -> Facts:
    """What the choice depends on."""
    on_gpu = shape.device.type == "cuda"
    return installed_facts(
        torch.cuda.get_device_capability(shape.device) if on_gpu else None,
        shape.dtype.itemsize,
        shape.head_dim,
    )


def _problem(kernel: Kernel, shape: Shape) -> str | None:
    """What is wrong with a kernel on its device; None where nothing is."""
    if kernel == "rows":
        return None
    try:
        windows = (None, max(_LENGTHS) // 2) if shape.windowed else (None,)
        distance = max(distance_from_rows(attend_by(kernel), shape, w) for w in windows)
    except torch.OutOfMemoryError:
        raise  # which says nothing about the kernel
    except Exception as error:  # whatever it is, the kernel is not to be had here
        return f"it fails here ({(str(error) or type(error).__name__).splitlines()[0]})"
    allowed = _TOLERANCE[shape.dtype.itemsize]
    if not distance <= allowed:
        return f"its results are wrong here (off by {distance:.2g} of them)"
    return None


def distance_from_rows(attend: Attend, shape: Shape, window: int | None) -> float:
    """How far a kernel's outputs and gradients are from those row by row in float32, at most,
    relative to their norm."""
    # Training may have begun in inference mode or under autocast: neither is to be noticed.
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(shape.device.type, enabled=False),
    ):
        drawn = _drawn(shape)
        found = _results(attend, [part.to(shape.dtype) for part in drawn], window)
        exact = _results(row_by_row, [part.to(shape.dtype).float() for part in drawn], window)
    return max(
        float((one.float() - other).norm() / other.norm())
        for one, other in zip(found, exact, strict=True)
    )


def _drawn(shape: Shape) -> list[Tensor]:
    """Queries, keys, values and the output's gradient, from numbers of their own."""
    drawing = torch.Generator().manual_seed(0)
    tokens, heads, few = sum(_LENGTHS), shape.heads, shape.kv_heads
    sizes = [(1, n, tokens, shape.head_dim) for n in (heads, few, few)]
    sizes.append((1, tokens, heads, shape.head_dim))
    return [torch.randn(size, generator=drawing).to(shape.device) for size in sizes]


def _results(attend: Attend, drawn: list[Tensor], window: int | None) -> list[Tensor]:
    """The output, and the gradients of queries, keys and values."""
    *parts, gradient = drawn
    leaves = [part.detach().requires_grad_() for part in parts]
    borders = torch.tensor([0, *_LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    rows = Rows(_LENGTHS, borders.to(gradient.device))
    query, key, value = leaves
    output = attend(query, key, value, rows, query.shape[-1] ** -0.5, window)
    return [output.detach(), *torch.autograd.grad(output, leaves, gradient)]
