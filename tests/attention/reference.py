"""What the variable-length kernels of GPUs compute, for a CPU, behind their interfaces."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def attention(
    query: Tensor, key: Tensor, value: Tensor, borders: Tensor, scale: float, left: int
) -> Tensor:
    """Causal attention in each row; (tokens, heads, head size), a row at a time, in plain products.

    Args:
        query: with as many heads as the keys, or a multiple.
        key: as many tokens as the queries.
        value: as the keys.
        borders: (rows + 1,).
        scale: of the products.
        left: tokens that one sees before itself; -1 for all.
    """
    times = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(times, dim=1), value.repeat_interleave(times, dim=1)
    rows = []
    for start, end in zip(borders.tolist()[:-1], borders.tolist()[1:], strict=True):
        q, k, v = (part[start:end].transpose(0, 1) for part in (query, key, value))
        back = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (back >= 0) & ((back <= left) if left >= 0 else True)
        products = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf)
        rows.append((products.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(rows)


def varlen_2_10(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int,
    max_k: int, is_causal: bool = False, return_aux: Any = None,
) -> Tensor:  # fmt: skip
    """`torch.nn.attention.varlen.varlen_attn` of PyTorch 2.10."""
    assert is_causal
    _check(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
    return attention(query, key, value, cu_seq_q, query.shape[-1] ** -0.5, -1)


def varlen_2_13(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int,
    max_k: int, *, return_aux: Any = None, scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False, seqused_k: Any = None,
    block_table: Any = None, num_splits: int | None = None,
) -> Tensor:  # fmt: skip
    """The same of PyTorch 2.13."""
    assert window_size[1] == 0
    assert enable_gqa == (query.shape[1] != key.shape[1])
    _check(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
    return attention(query, key, value, cu_seq_q, scale or query.shape[-1] ** -0.5, window_size[0])


def flash_attn() -> ModuleType:
    """The module flash_attn, with its one function that is used."""

    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
        max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0.0,
        softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:  # fmt: skip
        assert causal
        _check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return attention(q, k, v, cu_seqlens_q, softmax_scale or 1.0, window_size[0])

    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    return module


def efficient(
    query: Tensor, key: Tensor, value: Tensor, bias: None, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, dropout_p: float,
    custom_mask_type: int, compute_log_sumexp: bool, *, scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`aten._efficient_attention_forward`, as far as it is used."""
    assert (bias, dropout_p, custom_mask_type) == (None, 0.0, 1)
    assert compute_log_sumexp == torch.is_grad_enabled()
    assert query.shape == key.shape == value.shape
    parts = [part[0] for part in (query, key, value)]
    _check(*parts, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)  # type: ignore[misc]
    return (attention(*parts, cu_seqlens_q, scale, -1)[None],)  # type: ignore[misc]


def _check(
    query: Tensor, key: Tensor, value: Tensor, first: Tensor, second: Tensor, *longest: int
) -> None:
    """What all of them refuse."""
    assert first.dtype == second.dtype == torch.int32
    assert torch.equal(first, second)
    assert longest[0] == longest[1] == int(first.diff().max())
    for part in (query, key, value):
        assert part.dim() == 3
        assert part.is_contiguous()
        assert part.shape[0] == int(first[-1])
