"""What one process of a training stage computes, as far as memory depends on it.

configuration of a stage + architecture → tokens of the largest forward pass, dtype, adapter,
optimiser, rows of new tokens → `Work`, which medtrain.memory.estimate turns into bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from medtrain.config import LoraConfig, RunConfig
from medtrain.memory.architecture import Architecture

Device = Literal["cuda", "cpu"]
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Work:
    """Of one process."""

    tokens: int
    """Of the largest forward pass of training, padding included where rows are padded."""
    evaluated_tokens: int
    """Of the largest forward pass of an evaluation; 0 for none."""
    dtype_bytes: int
    """Of `model.dtype`."""
    quantized: bool
    double_quantization: bool
    lora: LoraConfig
    state_bytes: int
    """Of the optimiser, for every trained parameter."""
    new_rows: bool
    """Whether rows of new tokens are trained."""
    device: Device = "cuda"
    """Whose kernels compute it."""
    repeats_groups: bool = False
    """Whether keys and values are repeated for the queries that share them, as they are where
    PyTorch's flash attention cannot be had (medtrain.train.packed)."""


def work_of(
    config: RunConfig,
    stage: str,
    architecture: Architecture,
    *,
    auto_bytes: int = 2,
    device: Device = "cuda",
) -> Work:
    """What a process computes in a training stage.

    Args:
        config: the run's configuration.
        stage: `sft` or `dpo`.
        architecture: of the base.
        auto_bytes: bytes of a number where `model.dtype` is `auto`: 4 on a GPU without bfloat16,
            whatever the dtype is; such a GPU is older than flash attention.
        device: whose kernels compute it.
    """
    section = config.dpo if stage == "dpo" else config.sft
    a_row = section.max_length * sides_of(config, stage)
    dtype_bytes = _DTYPE_BYTES.get(config.model.dtype, auto_bytes)
    return Work(
        tokens=section.batch_size * a_row,
        evaluated_tokens=section.eval_batch_size * a_row if section.validation_fraction else 0,
        dtype_bytes=dtype_bytes,
        quantized=config.model.quantization == "nf4",
        double_quantization=config.model.double_quantization,
        lora=config.sft.lora,
        state_bytes=_state_bytes(config, section.optimizer, device),
        new_rows=config.model.chat_template == "chatml" and not architecture.knows_chatml,
        device=device,
        repeats_groups=device == "cuda" and 4 in (dtype_bytes, auto_bytes),
    )


def sides_of(config: RunConfig, stage: str) -> int:
    """Answers of a row of a stage: both of a pair, or one."""
    return 2 if stage == "dpo" and config.dpo.method != "rejection" else 1


def _state_bytes(config: RunConfig, optimizer: str, device: Device) -> int:
    """Two moments for each parameter, in 8 or in 32 bits."""
    if optimizer == "auto":
        optimizer = "paged_adamw_8bit" if config.model.quantization == "nf4" else "adamw_torch"
    return 2 if "8bit" in optimizer and device != "cpu" else 8
