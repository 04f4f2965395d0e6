"""A small random model of every family whose rows are packed."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from medtrain.attention.packed import attention_for
from medtrain.train.packed import select_supervised

VOCAB, PAD, WINDOW = 96, 0, 24
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 256, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def family_config(family: str) -> Any:
    """Of two layers; with a window, where the family knows one, in its first layer at least."""
    known = AutoConfig.for_model(family)
    sizes = dict(_SIZES)
    if hasattr(known, "sliding_window"):
        sizes |= {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 0}
    if getattr(known, "layer_types", None) is not None:
        kinds = ["sliding_attention"] if hasattr(known, "sliding_window") else []
        sizes["layer_types"] = [*kinds, *["full_attention"] * (2 - len(kinds))]
    return AutoConfig.for_model(family, **sizes)


def plain_model(family: str, device: torch.device, dtype: torch.dtype) -> Any:
    """As transformers builds it, with its own attention, in plain products."""
    return _drawn(family, "eager", device, dtype)


def packed_model(family: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The same weights, as they are trained."""
    model = _drawn(family, attention_for("auto", packed=True), device, dtype)
    add_fused_lm_head(model)
    select_supervised(model.base_model)
    return model


def _drawn(family: str, attention: str | None, device: torch.device, dtype: torch.dtype) -> Any:
    """Weights that let attention matter: larger than a fresh model's, biases included."""
    model = AutoModelForCausalLM.from_config(family_config(family), attn_implementation=attention)
    drawing = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=drawing)
            around_one = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(noise * (0.05 if around_one else 0.2) + (1.0 if around_one else 0.0))
    return model.to(device, dtype).eval()
