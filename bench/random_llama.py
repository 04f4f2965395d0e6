"""A Llama of any size with random weights, in 4 bits or in 16, built layer by layer.

sizes → the model without memory (meta device) → each linear layer drawn in the compute dtype on the
device, quantised to NF4 and dropped → embeddings, norms and output layer in the compute dtype → the
marks by which transformers, PEFT and TRL know a quantised model. Above the result itself, one layer
is alive at a time, and none of it in main memory where there is a GPU. Equal seeds, equal weights.
Without quantising it ends after the drawing.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig
from transformers.integrations import replace_with_bnb_linear
from transformers.quantizers import AutoHfQuantizer

LLAMA_3_8B: dict[str, Any] = {
    "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 8192, "rope_theta": 500_000.0, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_3_1B: dict[str, Any] = {
    "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "max_position_embeddings": 8192, "rope_theta": 500_000.0, "tie_word_embeddings": False,
}  # fmt: skip
"""Llama-3.2-1B but for its tied embeddings: input and output are drawn apart."""
MIDDLE: dict[str, Any] = {
    "vocab_size": 32_000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 12,
    "num_attention_heads": 16, "num_key_value_heads": 8, "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}  # fmt: skip
"""Large enough for its weights and activations to outweigh what any training has."""
TINY: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}  # fmt: skip
SPREAD = 0.02


def random_llama(
    shape: LlamaConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    attention: str | None,
    quantized: bool = True,
) -> Any:
    """The model in evaluation mode.

    Args:
        shape: its sizes.
        dtype: of computation, of what is not quantised, and of quantised storage.
        device: where it lies.
        attention: transformers' name of an implementation; None lets it choose.
        quantized: linear layers in NF4.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape, dtype=dtype, attn_implementation=attention)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )
    if quantized:
        model = replace_with_bnb_linear(model, ["lm_head"], nf4)
    drawing = torch.Generator(device).manual_seed(0)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, _drawn(module, parameter, dtype, device, drawing))
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False  # as medtrain loads a base
    rotary = model.model.rotary_emb  # its frequencies are computed, not drawn
    with device:
        model.model.rotary_emb = type(rotary)(config=shape)
    if quantized:
        _mark_quantized(model, nf4, device)
    return model.eval()


def _drawn(
    module: Any, parameter: Any, dtype: torch.dtype, device: torch.device, drawing: torch.Generator
) -> torch.nn.Parameter:
    """A parameter of the device in place of one without memory."""
    if isinstance(module, bitsandbytes.nn.Linear4bit):
        size = (module.out_features, module.in_features)
        values = torch.empty(size, dtype=dtype, device=device).normal_(0, SPREAD, generator=drawing)
        kept = {key: value for key, value in vars(parameter).items() if key != "quant_state"}
        quantized: torch.nn.Parameter = bitsandbytes.nn.Params4bit(
            values, requires_grad=False, **{**kept, "module": module}
        ).to(device)
        return quantized
    values = torch.empty(parameter.shape, dtype=dtype, device=device)
    if parameter.dim() == 1:
        return torch.nn.Parameter(values.fill_(1.0), requires_grad=False)
    return torch.nn.Parameter(values.normal_(0, SPREAD, generator=drawing), requires_grad=False)


def _mark_quantized(model: Any, nf4: BitsAndBytesConfig, device: torch.device) -> None:
    """What from_pretrained leaves on a model that it has quantised."""
    model.hf_quantizer = AutoHfQuantizer.from_config(nf4)
    model.is_quantized = model.is_loaded_in_4bit = True
    model.quantization_method = nf4.quant_method
    model.config.quantization_config = nf4
    model.hf_device_map = {"": device.index or 0 if device.type == "cuda" else "cpu"}
