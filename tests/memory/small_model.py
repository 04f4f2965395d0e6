"""A small random Llama as a training stage has it: quantised, with an adapter and a fused loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from medtrain.config import LoraConfig
from medtrain.memory import Architecture, Work
from medtrain.memory.architecture import from_config
from medtrain.train.adapter import add_adapter
from medtrain.train.fused_lora import fuse

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Setup:
    """What is trained, and how."""

    quantized: bool = True
    targets: Any = "all-linear"
    dropout: float = 0.05
    fused: bool = False
    checkpointing: bool = False
    evaluated_tokens: int = 0
    new_rows: bool = False
    dtype: torch.dtype = torch.float32
    tokens: int = 1024
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def work(self) -> Work:
        """As the estimate takes it."""
        return Work(
            tokens=self.tokens,
            evaluated_tokens=self.evaluated_tokens,
            dtype_bytes=self.dtype.itemsize,
            quantized=self.quantized,
            double_quantization=True,
            lora=self.lora,
            state_bytes=8,
            new_rows=self.new_rows,
            fused=self.fused,
            device="cpu",
        )

    @property
    def lora(self) -> LoraConfig:
        """The adapter."""
        return LoraConfig(r=8, alpha=16, dropout=self.dropout, targets=self.targets)


def build(setup: Setup, directory: Path) -> tuple[Any, Architecture]:
    """The model on a CPU, ready to be trained, and its sizes."""
    config = LlamaConfig(
        **{"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 768,
           "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
           "max_position_embeddings": 4096, **setup.sizes}
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(setup.dtype).save_pretrained(directory)
    options: dict[str, Any] = {"dtype": setup.dtype, "device_map": {"": "cpu"}}
    if setup.quantized:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=setup.dtype, bnb_4bit_quant_storage=setup.dtype,
        )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(directory, **options)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    add_fused_lm_head(model)
    chat: Any = SimpleNamespace(new_token_ids=[5, 6] if setup.new_rows else [])
    trained = add_adapter(model, setup.lora, chat, seed=0)
    if setup.fused:
        assert not fuse(trained).plain
    if setup.checkpointing:
        trained.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        trained.enable_input_require_grads()
    architecture = from_config(config.to_dict())
    assert architecture is not None
    return trained.train(), architecture


def train(model: Any, setup: Setup, *, whole: bool = True, steps: int = 2) -> None:
    """A few optimiser steps on random tokens.

    Args:
        model: of `build`.
        setup: what it was built from.
        whole: with the output layer and its loss; else with a loss on the last hidden states.
        steps: of the optimiser; its state is there after the first.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    ids = torch.randint(0, model.config.vocab_size, (1, setup.tokens))
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=setup.dtype == torch.bfloat16):
            if whole:
                loss = model(input_ids=ids, labels=ids, fused_lm_head=True, use_cache=False).loss
            else:
                body = model.get_base_model().model
                loss = body(input_ids=ids, use_cache=False).last_hidden_state.float().mean()
        loss.backward()
        del loss
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)


def evaluate(model: Any, setup: Setup) -> None:
    """The loss of random tokens, as an evaluation computes it."""
    ids = torch.randint(0, model.config.vocab_size, (1, setup.evaluated_tokens))
    with torch.no_grad():
        model.eval()(input_ids=ids, labels=ids, fused_lm_head=True, use_cache=False)
