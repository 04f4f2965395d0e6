"""Rows side by side without padding: what a forward pass of several rows really computes.

a padded batch (rows, length), as TRL's losses want it → its tokens as one sequence (1, tokens),
each row at positions of its own and attending to itself alone → hidden states → TRL's fused output
layer at the supervised positions only → what it returns, put back into (rows, length - 1). The
losses do not notice: a packed step learns exactly what a padded one does.

Rows are kept apart by an attention function of our own, which runs PyTorch's causal attention row
by row, or by flash attention's variable-length kernels.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED_ATTENTION = "medtrain_packed"
_FLASH = ("flash_attention_2", "flash_attention_3")
_KEEPS_ROWS_APART = frozenset({
    "llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "smollm3", "olmo2", "granite", "cohere",
    "starcoder2", "stablelm", "helium", "glm", "glm4", "ministral",
})  # fmt: skip
"""Architectures that mix tokens by attention through transformers' interface alone, and whose
positions come from `position_ids`."""


def why_not_packed(config: Any, max_length: int) -> str | None:
    """Why a model's rows cannot be kept apart in one sequence; None where they can.

    Args:
        config: transformers' configuration of the model.
        max_length: tokens of the longest row.
    """
    if config.model_type not in _KEEPS_ROWS_APART:
        return f"{config.model_type} is not known to keep rows apart in one sequence"
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and max_length > window:
        return f"rows of {max_length} tokens go beyond the model's attention window of {window}"
    return None


def attention_for(wanted: str, dtype: torch.dtype, *, packed: bool) -> str | None:
    """The attention implementation to load a model with; None lets transformers choose.

    Args:
        wanted: `model.attention`.
        dtype: of computation; flash attention has 16-bit kernels only.
        packed: rows lie in one sequence.
    """
    if not packed:
        return None if wanted == "auto" else wanted
    flash = _has_flash_kernels() and importlib.util.find_spec("flash_attn") is not None
    if wanted in _FLASH or (wanted == "auto" and flash and dtype != torch.float32):
        return wanted if wanted in _FLASH else _FLASH[0]
    return PACKED_ATTENTION


def pack(attention_mask: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """Where the tokens of a padded batch lie in one sequence, for `PackedForward`.

    Args:
        attention_mask: (rows, length), 1 for tokens; padding is on the right.
        labels: (rows, length), -100 for tokens without loss.

    Returns:
        `flat`: (tokens,) places of the tokens in the flattened batch; `position_ids`: (1, tokens);
        `supervised`: (n,) places in the sequence whose next token has a loss; `scored`: (1, n)
        those next tokens; `target`: (n,) where their results go in a flattened (rows, length - 1);
        `row_lengths`: tokens of each row.
    """
    length = attention_mask.shape[1]
    row_lengths = attention_mask.sum(dim=1)
    flat = attention_mask.flatten().nonzero().squeeze(1)
    column = flat % length
    here = torch.full((attention_mask.numel(),), -1, dtype=torch.long)
    here[flat] = torch.arange(len(flat))
    with_loss = (labels.flatten() != -100) & (torch.arange(labels.numel()) % length > 0)
    scored_at = (with_loss & (attention_mask.flatten() == 1)).nonzero().squeeze(1)
    if not len(
        scored_at
    ):  # a batch without loss still takes part, with a token that does not count
        scored_at = flat[1:2]
    return {
        "flat": flat,
        "position_ids": column[None],
        "supervised": here[scored_at] - 1,
        "scored": labels.flatten()[scored_at][None],
        "target": scored_at // length * (length - 1) + scored_at % length - 1,
        "row_lengths": tuple(int(n) for n in row_lengths),
    }


class PackedForward:
    """A model as TRL's losses call it, computing a packed batch where the inputs hold one."""

    def __init__(self, model: Any) -> None:
        """`model` is the trained model as it is wrapped for training."""
        self._model = model

    def __call__(self, **inputs: Any) -> Any:
        """TRL's FusedCausalLMOutput, its fields (rows, length - 1)."""
        packed = inputs.pop("packed", None)
        if packed is None:
            return self._model(**inputs)
        rows, length = inputs["input_ids"].shape
        outputs = self._model(
            input_ids=inputs["input_ids"].flatten()[packed["flat"]][None],
            position_ids=packed["position_ids"],
            shift_labels=packed["scored"],
            supervised=packed["supervised"],
            use_cache=False,
            fused_lm_head=True,
            **_lengths(packed["row_lengths"], inputs["input_ids"].device),
        )
        for name in _PER_TOKEN:
            values = getattr(outputs, name)
            if values is not None:
                whole = values.new_zeros(rows * (length - 1))
                placed = whole.index_put((packed["target"],), values[0])
                setattr(outputs, name, placed.view(rows, length - 1))
        return outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


_AMPERE = (8, 0)
"""The compute capability that flash attention begins with."""
_PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")


def select_supervised(backbone: torch.nn.Module) -> None:
    """Let a model's body give the hidden states of the supervised positions only.

    The output layer costs as much as several layers, and prompts have no loss.
    """

    def select(module: Any, args: Any, kwargs: Mapping[str, Any], outputs: Any) -> Any:
        positions = kwargs.get("supervised")
        if positions is not None:
            outputs.last_hidden_state = outputs.last_hidden_state[:, positions]
        return outputs

    backbone.register_forward_hook(select, with_kwargs=True)


def _lengths(row_lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """The rows' borders, as our attention and as flash attention take them."""
    borders = torch.tensor([0, *row_lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    borders = borders.to(device, non_blocking=True)
    longest = max(row_lengths)
    return {
        "row_lengths": tuple(row_lengths),
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    row_lengths: Sequence[int] | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each row; (1, heads, tokens, head size) → (1, tokens, heads, …)."""
    if row_lengths is None:
        attended: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return attended
    grouped = key.shape[1] != query.shape[1]
    if grouped and not _takes_groups(query):
        times = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(times, dim=1) for part in (key, value))
        grouped = False
    sizes = list(row_lengths)
    rows = zip(*(torch.split(part, sizes, dim=2) for part in (query, key, value)), strict=True)
    each = [
        torch.nn.functional.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=grouped
        )
        for q, k, v in rows
    ]
    return torch.cat(each, dim=2).transpose(1, 2).contiguous(), None


def _takes_groups(query: torch.Tensor) -> bool:
    """Whether PyTorch has a kernel for fewer keys than queries that does not keep all of their
    products, as the fallback does: on GPUs only its flash attention, in 16 bits."""
    if not query.is_cuda:
        return True
    return query.element_size() == 2 and _has_flash_kernels(query.device)


def _has_flash_kernels(device: torch.device | None = None) -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= _AMPERE


def _packed_mask(*args: Any, **kwargs: Any) -> Any:
    """No mask for a packed sequence, which comes without one; the usual one for padded rows."""
    if kwargs.get("attention_mask") is None:
        return None
    return sdpa_mask(*args, **kwargs)


AttentionInterface.register(PACKED_ATTENTION, _packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, _packed_mask)
