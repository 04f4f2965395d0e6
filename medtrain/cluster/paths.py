"""By which paths stages will compute, as far as that is known before they run.

configuration + GPU + sizes of the base → how rows attend (medtrain.attention), how adapters are
computed (medtrain.config.lora_path), with which optimiser, how answers are decoded, where models
are merged. On the GPU itself kernels and decoders are tried before they are trusted; a stage's log
says what came of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from medtrain.attention import Facts, choose, installed_facts
from medtrain.attention.choice import KERNELS, Wanted
from medtrain.attention.families import FAMILIES
from medtrain.cluster.hardware import Hardware
from medtrain.config import EvaluateConfig, GenerateConfig, JobKind, RunConfig
from medtrain.config.lora_path import why_not_fused
from medtrain.generate.slots.sizes import MAX_SLOTS
from medtrain.gpus import AT_WORK, Gpu
from medtrain.memory import Architecture, Choice
from medtrain.memory.choose import gib
from medtrain.memory.estimate import CONTEXT
from medtrain.memory.work import DTYPE_BYTES, optimizer_under
from medtrain.run import Trained


class Paths(NamedTuple):
    """What a stage computes with, in words."""

    precision: str
    """Of computation, and how the base is stored."""
    attention: str
    lora: str
    optimizer: str


def paths_of(
    config: RunConfig,
    stage: Trained,
    gpu: Gpu | None,
    architecture: Architecture | None,
    choice: Choice,
) -> Paths:
    """The paths of a training stage.

    Args:
        config: the run's.
        stage: whose section says how.
        gpu: that it gets; None for a CPU.
        architecture: of the base; None where it is not known.
        choice: its strategy.
    """
    return Paths(
        _precision(config, gpu),
        _attention(config, stage, gpu, architecture),
        _lora(config, choice.strategy),
        _optimizer(config, stage, gpu, choice),
    )


def job_path(
    config: RunConfig, kind: JobKind, gpu: Gpu | None, architecture: Architecture | None
) -> str:
    """What a job that trains nothing computes with, in words; nothing for jobs without a model.

    Args:
        config: the run's.
        kind: of job.
        gpu: that it gets; None for a CPU.
        architecture: of the base; None where it is not known.
    """
    attention = _attention(config, "dpo", gpu, architecture)
    if kind == "reference":
        return f"{attention}; adapters {_lora(config, config.train.strategy)}"
    if kind == "merge":
        return _merging(config, gpu, architecture)
    if kind == "generate":
        return _decoding(config.generate, gpu)
    if kind == "evaluate":
        measured = config.evaluate.held_out_loss and config.evaluate.engine == "transformers"
        loss = f"; held-out loss: {attention}" if measured else ""
        return _decoding(config.evaluate, gpu) + loss
    return ""


def _decoding(section: GenerateConfig | EvaluateConfig, gpu: Gpu | None) -> str:
    if section.engine != "transformers":
        return f"answers by {'an endpoint' if section.engine == 'openai' else section.engine}"
    if gpu is None or section.decoding == "batches":
        return f"answers decoded {section.prompts_together} prompts at a time"
    rows = f"{section.batch_size} prompts" if section.batch_size != "auto" else f"{MAX_SLOTS} rows"
    return f"answers decoded in slots, up to {rows} at a time, or in batches if the model needs it"


def _merging(config: RunConfig, gpu: Gpu | None, architecture: Architecture | None) -> str:
    if config.merge.into == "dequantized" and config.model.quantization == "nf4":
        return "on the CPU, layer by layer"
    if gpu is None or architecture is None:
        return "on the CPU" if gpu is None else "on the GPU if the base fits it"
    each = 4 if config.model.dtype == "float32" else 2
    needed = AT_WORK * each * architecture.parameters.total
    where = "on the GPU" if needed < gpu.memory_bytes else "on the CPU"
    return f"{where} (the base needs {gib(needed)}, the GPU has {gib(gpu.memory_bytes)})"


def warnings_of_answering(
    config: RunConfig, hardware: Hardware, kinds: Iterable[JobKind]
) -> Iterator[str]:
    """Where a model that is trained in 4 bits will not fit its GPU to answer.

    Args:
        config: the run's.
        hardware: of its jobs.
        kinds: of the jobs to do that have GPUs.
    """
    architecture = hardware.architecture
    for kind in dict.fromkeys(kinds):
        section = {"generate": config.generate, "evaluate": config.evaluate}.get(kind)
        if section is None or section.engine != "transformers" or architecture is None:
            continue
        gpu = hardware.gpu(kind)
        needed = hardware.bytes_each(kind) * architecture.parameters.total + CONTEXT
        if needed >= gpu.memory_bytes:
            yield (
                f"{kind} does not fit: models answer unquantised, and weights alone need "
                f"{gib(needed)} of the {gpu.name}'s {gib(gpu.memory_bytes)}: ask for a larger GPU "
                f"(cluster.stages.{kind}.gpu_type), or answer by an endpoint ({kind}.engine=openai)"
            )


def _precision(config: RunConfig, gpu: Gpu | None) -> str:
    dtype = config.model.dtype
    if dtype == "auto":
        dtype = "bfloat16" if gpu is not None and gpu.bfloat16 else "float32"
    return f"{dtype}, the base in 4 bits" if config.model.quantization == "nf4" else dtype


def _attention(
    config: RunConfig, stage: Trained, gpu: Gpu | None, architecture: Architecture | None
) -> str:
    section, wanted = getattr(config, stage), config.model.attention
    if section.packing is False or wanted == "eager":
        why = "packing is off" if section.packing is False else "model.attention is eager"
        return f"padded rows ({why})"
    if architecture is None:
        return "chosen when the base is loaded"
    if architecture.kind not in FAMILIES:
        return f"padded rows ({architecture.kind} is not known to keep packed ones apart)"
    asked: Wanted = wanted
    choices = choose(_facts(config, gpu, architecture), asked)
    if not choices:
        return f"packed rows, but {wanted} is not to be had"
    best = choices[0]
    return f"packed rows by {best.kernel}: {KERNELS[best.kernel]}" + (
        f" ({best.reason})" if best.reason else ""
    )


def _facts(config: RunConfig, gpu: Gpu | None, architecture: Architecture) -> Facts:
    automatic = gpu.auto_bytes if gpu else DTYPE_BYTES["float32"]
    return installed_facts(
        gpu.capability if gpu else None,
        DTYPE_BYTES.get(config.model.dtype, automatic),
        architecture.head_dim,
    )


def _lora(config: RunConfig, strategy: str) -> str:
    why = why_not_fused(config, strategy)
    return "fused with the base layers" if why is None else f"PEFT's own path ({why})"


def _optimizer(config: RunConfig, stage: Trained, gpu: Gpu | None, choice: Choice) -> str:
    named: str = getattr(config, stage).optimizer
    if named != "auto":
        return named
    return "adamw_torch" if gpu is None else optimizer_under(choice.strategy, choice.optimizer)
