"""The kernels: causal attention inside each row of a packed sequence.

queries, keys and values (1, heads, tokens, head size) + the rows' borders → the kernel's own layout
→ (1, tokens, heads, head size). Keys and values may have fewer heads than queries, each shared by a
group of neighbours. With a window w a token attends to itself and to the w - 1 tokens before it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from medtrain.attention.choice import Kernel


class Rows(NamedTuple):
    """Where the rows of a packed sequence lie."""

    lengths: tuple[int, ...]
    """Tokens of each row."""
    borders: Tensor
    """(rows + 1,) int32, on the device: where each row begins, and the last one ends."""

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths)


_efficient_attention = torch.ops.aten._efficient_attention_forward
_CAUSAL = 1
"""Its mask that lets every token of a row see itself and those before it."""

Attend = Callable[[Tensor, Tensor, Tensor, Rows, float, int | None], Tensor]
"""(queries, keys, values, rows, scale, window or None) → (1, tokens, heads, head size)."""


def attend_by(kernel: Kernel) -> Attend:
    """The function of a kernel."""
    return {
        "varlen": _varlen,
        "flash": _flash,
        "efficient": _efficient,
        "rows": row_by_row,
    }[kernel]


def leave_cudnn_out() -> None:
    """Keep PyTorch from taking cuDNN's attention, in this process, from here on.

    It plans anew for every length that it has not seen, which took 60 ms forward and 70 ms backward
    on an H200, beside 0.1 and 0.3 ms for one that it had; and lengths are new nearly every time:
    of padded batches, prompts and rows.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, rows: Rows, scale: float, window: int | None
) -> Tensor:
    """https://docs.pytorch.org/docs/stable/nn.attention.varlen.html"""
    from torch.nn.attention.varlen import varlen_attn

    takes = _parameters(varlen_attn)
    if window is not None and "window_size" not in takes:
        return row_by_row(query, key, value, rows, scale, window)
    if "scale" not in takes:  # its own is 1 / sqrt(head size)
        query = query * (scale * query.shape[-1] ** 0.5)
    more: dict[str, Any] = {"scale": scale} if "scale" in takes else {}
    # The releases before do not ask: the kernel itself takes fewer keys than queries.
    if query.shape[1] != key.shape[1] and "enable_gqa" in takes:
        more["enable_gqa"] = True
    if "window_size" in takes:
        more["window_size"] = (-1 if window is None else window - 1, 0)
    else:
        more["is_causal"] = True
    call: Callable[..., Any] = varlen_attn  # its interface is another in every release
    packed = [_tokens_first(part) for part in (query, key, value)]
    longest = rows.longest
    attended: Tensor = call(*packed, rows.borders, rows.borders, longest, longest, **more)
    return attended[None]


def _flash(
    query: Tensor, key: Tensor, value: Tensor, rows: Rows, scale: float, window: int | None
) -> Tensor:
    """https://github.com/Dao-AILab/flash-attention"""
    from flash_attn import flash_attn_varlen_func

    attended: Tensor = flash_attn_varlen_func(
        *(_tokens_first(part) for part in (query, key, value)),
        rows.borders,
        rows.borders,
        rows.longest,
        rows.longest,
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
    )
    return attended[None]


def _efficient(
    query: Tensor, key: Tensor, value: Tensor, rows: Rows, scale: float, window: int | None
) -> Tensor:
    """The kernel behind PyTorch's attention over nested tensors, in any precision and on older
    cards too. Called by itself, for building nested tensors takes longer than it does."""
    if window is not None:
        return row_by_row(query, key, value, rows, scale, window)
    packed = (_tokens_first(part)[None] for part in (query, *repeated(query, key, value)))
    attended: Tensor = _efficient_attention(
        *packed,
        None,
        rows.borders,
        rows.borders,
        rows.longest,
        rows.longest,
        0.0,
        _CAUSAL,
        torch.is_grad_enabled(),
        scale=scale,
    )[0]
    return attended


def row_by_row(
    query: Tensor, key: Tensor, value: Tensor, rows: Rows, scale: float, window: int | None
) -> Tensor:
    """A call a row, on any device and in any precision; what the others are compared with."""
    grouped = query.shape[1] != key.shape[1]
    if grouped and not takes_groups(query.device, query.dtype):
        key, value = repeated(query, key, value)
        grouped = False
    parts = (torch.split(part, list(rows.lengths), dim=2) for part in (query, key, value))
    each = [
        _windowed(q, k, v, scale, window)
        if window is not None and q.shape[2] > window
        else scaled_dot_product_attention(q, k, v, scale=scale, is_causal=True, enable_gqa=grouped)
        for q, k, v in zip(*parts, strict=True)
    ]
    return torch.cat(each, dim=2).transpose(1, 2).contiguous()


def _windowed(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int) -> Tensor:
    """A row that is longer than the window."""
    place = torch.arange(query.shape[2], device=query.device)
    back = place[:, None] - place  # (tokens, tokens): how far a key lies behind a query
    key, value = repeated(query, key, value)
    return scaled_dot_product_attention(
        query, key, value, attn_mask=(back >= 0) & (back < window), scale=scale
    )


def repeated(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with as many heads as the queries, each repeated for its group."""
    times = query.shape[1] // key.shape[1]
    if times == 1:
        return key, value
    return key.repeat_interleave(times, dim=1), value.repeat_interleave(times, dim=1)


def takes_groups(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch has a kernel for fewer keys than queries that does not keep all of their
    products, as the fallback does: on GPUs only its flash attention, in 16 bits."""
    if device.type != "cuda":
        return True
    return dtype.itemsize == 2 and torch.cuda.get_device_capability(device) >= (8, 0)


def _tokens_first(part: Tensor) -> Tensor:
    """(1, heads, tokens, head size) → (tokens, heads, head size); no copy where a projection's
    output was only viewed as heads."""
    return part[0].transpose(0, 1).contiguous()


@lru_cache
def _parameters(function: Any) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)
