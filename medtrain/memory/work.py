"""What one process of a training stage computes, as far as memory depends on it.

configuration of a stage + architecture → tokens of the largest forward pass, dtype, adapter,
optimiser, rows of new tokens → `Work`, which medtrain.memory.estimate turns into bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from medtrain.attention import choose, installed_facts
from medtrain.config import LoraConfig, RunConfig
from medtrain.config.lora_path import why_not_fused
from medtrain.memory.architecture import Architecture

Device = Literal["cuda", "cpu"]
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Of a number, by `model.dtype`; `auto` depends on the GPU."""
FUSED, PAGED = "adamw_torch_fused", "paged_adamw_8bit"
"""What `optimizer: auto` stands for on a GPU."""
_V100, _A100 = (7, 0), (8, 0)
"""Compute capabilities before and since flash attention."""


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
    fused: bool = False
    """Whether adapters are computed together with their base layers, where no strategy shards
    these."""
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
    optimizer: str | None = None,
) -> Work:
    """What a process computes in a training stage.

    Args:
        config: the run's configuration.
        stage: `sft` or `dpo`.
        architecture: of the base.
        auto_bytes: bytes of a number where `model.dtype` is `auto`: 4 on a GPU without bfloat16,
            whatever the dtype is; such a GPU is older than flash attention.
        device: whose kernels compute it.
        optimizer: by transformers' name; None for the first of `optimizers_of`.
    """
    section = config.dpo if stage == "dpo" else config.sft
    a_row = section.max_length * sides_of(config, stage)
    dtype_bytes = DTYPE_BYTES.get(config.model.dtype, auto_bytes)
    return Work(
        tokens=section.batch_size * a_row,
        evaluated_tokens=section.eval_batch_size * a_row if section.validation_fraction else 0,
        dtype_bytes=dtype_bytes,
        quantized=config.model.quantization == "nf4",
        double_quantization=config.model.double_quantization,
        lora=_lora(config, stage),
        state_bytes=_state_bytes(
            optimizer or optimizers_of(config, section.optimizer, device)[0], device
        ),
        new_rows=config.model.chat_template == "chatml" and not architecture.knows_chatml,
        device=device,
        fused=why_not_fused(config, "auto") is None,
        repeats_groups=device == "cuda" and _repeats_groups(dtype_bytes, auto_bytes),
    )


def sides_of(config: RunConfig, stage: str) -> int:
    """Answers of a row of a stage: both of a pair, or one."""
    return 2 if stage == "dpo" and config.dpo.method != "rejection" else 1


def _lora(config: RunConfig, stage: str) -> LoraConfig:
    """The adapter as a stage trains it: TRL's preference trainers switch dropout off."""
    compares = stage == "dpo" and config.dpo.method != "rejection"
    return config.sft.lora.model_copy(update={"dropout": 0.0}) if compares else config.sft.lora


def _repeats_groups(dtype_bytes: int, auto_bytes: int) -> bool:
    """Whether attention is computed by a kernel that wants as many keys as queries."""
    older = auto_bytes == DTYPE_BYTES["float32"]
    facts = installed_facts(_V100 if older else _A100, dtype_bytes, head_dim=128)
    return choose(facts)[0].repeats_groups


def optimizers_of(config: RunConfig, optimizer: str, device: Device) -> tuple[str, ...]:
    """The optimisers of transformers that a stage's `optimizer` may stand for, the best first.

    Moments in 32 bits are small beside a quantised base, and bitsandbytes' optimisers wait for the
    GPU once for every tensor of the adapter; those in 8 bits are for where nothing else fits.
    """
    if optimizer != "auto":
        return (optimizer,)
    if device == "cpu":
        return ("adamw_torch",)
    return (FUSED, PAGED) if config.model.quantization == "nf4" else (FUSED,)


def optimizer_under(strategy: str, chosen: str | None) -> str:
    """What `auto` comes to on a GPU: strategies that shard hand an optimiser pieces of flat
    tensors, and step it themselves.

    Args:
        strategy: that training is launched with.
        chosen: one of `optimizers_of`; None where memory was not estimated.
    """
    if strategy == "fsdp2" or (strategy != "ddp" and chosen in (None, FUSED)):
        return "adamw_torch"
    return chosen or FUSED


def _state_bytes(optimizer: str, device: Device) -> int:
    """Two moments for each parameter, in 8 or in 32 bits."""
    return 2 if "8bit" in optimizer and device != "cpu" else 8
