"""What answering prompts is likely to take on a GPU.

how many rows go on at once (medtrain.generate.slots.sizes where memory decides, else the batch) →
seconds of a step, by the weights and the keys and values that it reads → steps, and the prompts'
own reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from medtrain.config import EvaluateConfig, GenerateConfig
from medtrain.generate.slots.sizes import Footprint, slot_length
from medtrain.gpus import DECODING_SHARE, STEP_FLOOR_S, Gpu
from medtrain.memory import Architecture


@dataclass(frozen=True, slots=True)
class Decoding:
    """What is to be answered."""

    section: GenerateConfig | EvaluateConfig
    prompts: int
    samples: int
    prompt_tokens: float
    """Of a prompt, on average."""


@dataclass(frozen=True, slots=True)
class Decoders:
    """What it is answered with."""

    gpu: Gpu
    architecture: Architecture | None
    """Of the base; None where nobody knows."""
    dtype: str
    """`model.dtype`."""
    bytes_each: int
    """Of a weight."""


def decoding_s(work: Decoding, machine: Decoders, parameters: float) -> float:
    """Seconds in which a model of this many parameters answers everything."""
    section, gpu, dtype = work.section, machine.gpu, machine.dtype
    together, slots_bytes = section.prompts_together, 0
    footprint = _footprint(work, machine, parameters)
    if footprint is not None:
        length = slot_length(round(work.prompt_tokens) + section.max_new_tokens)
        slots = footprint.slots_in(
            gpu.memory_bytes, length, samples=work.samples, rows=work.prompts * work.samples
        )
        together = max(1, slots // work.samples)
        slots_bytes = slots * length * footprint.token_bytes
    together = min(together, work.prompts)
    rows, floor = together * work.samples, STEP_FLOOR_S[section.engine]
    a_step = gpu.decode_step_s(parameters, machine.bytes_each, rows, floor, dtype)
    a_step += slots_bytes / (gpu.bytes_per_s * DECODING_SHARE)
    reading = gpu.compute_s(2 * parameters * work.prompts * work.prompt_tokens, dtype)
    return ceil(work.prompts / together) * section.max_new_tokens * a_step + reading


def _footprint(work: Decoding, machine: Decoders, parameters: float) -> Footprint | None:
    """What fills a card where its memory decides how many rows go on at once."""
    section, shape, each = work.section, machine.architecture, machine.bytes_each
    by_memory = section.batch_size == "auto" and section.decoding == "auto"
    if shape is None or section.engine != "transformers" or not by_memory:
        return None
    return Footprint(
        weight_bytes=round(parameters * each),
        token_bytes=2 * shape.layers * shape.kv_heads * shape.head_dim * each,
        hidden=shape.hidden,
        number_bytes=each,
        vocabulary=shape.vocab,
    )
