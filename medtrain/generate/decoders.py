"""Which way of decoding a model gets, and why.

a GPU and a model that slots are for → slots (medtrain.generate.slots); everything else → batch by
batch (medtrain.generate.batches). Both draw the same tokens from the same logits; by rounding, the
logits of one and the other differ in their last bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, Protocol

import torch

from medtrain.config.answers import AUTO_PROMPTS
from medtrain.console import Console
from medtrain.generate.batches import BatchDecoder
from medtrain.generate.decode import Question, Vocabulary
from medtrain.generate.sampling import Sampling
from medtrain.generate.slots.cache import CacheShape
from medtrain.generate.slots.decoder import SlotDecoder
from medtrain.generate.slots.fitting import footprint_of, try_slots


class Decoder(Protocol):
    """Fills questions."""

    def answer(self, units: Iterable[Sequence[Question]]) -> Iterator[Question]:
        """Fill the rows of all questions of all units; each is handed over when it is answered.

        Raises:
            MedtrainError: it cannot go on with any question; what was handed over stands.
        """

    def close(self) -> None:
        """Let go of memory."""


def choose_decoder(
    model: Any,
    sampling: Sampling,
    vocabulary: Vocabulary,
    console: Console,
    *,
    prompts: int | Literal["auto"] = "auto",
    in_all: int | None = None,
    way: Literal["auto", "slots", "batches"] = "auto",
) -> Decoder:
    """The decoder for a model where it lies; says which one, and why.

    Args:
        model: a causal language model of transformers, in evaluation mode, on its device.
        sampling: how to draw.
        vocabulary: stop, pad, size.
        console: is told.
        prompts: whose answers are computed at a time; `auto` lets memory decide.
        in_all: prompts that the whole stage has; None where nobody knows.
        way: `slots` takes them on a CPU too, where they only lose.

    Raises:
        torch.OutOfMemoryError: the model leaves no room for a first try.
    """
    if model.device.type == "cuda" and model.dtype == torch.float32:
        _warn_of_float32(console)
    why, surprising = "", False
    if way == "batches":
        why = "the configuration says so"
    elif way == "auto" and model.device.type != "cuda":
        why = "there is no CUDA device"
    else:
        fit = try_slots(model, sampling, vocabulary)
        if fit.shape is not None:
            number = _number_of_slots(model, fit.shape, prompts, in_all, sampling)
            return SlotDecoder(
                model, sampling, vocabulary, shape=fit.shape, number=number, console=console
            )
        why, surprising = fit.why_not, fit.surprising
    message = f"decoding: batch by batch, because {why}"
    if surprising:
        console.warn("decoding", f"{message}; answers take longer")
    else:
        tell = console.event if model.device.type == "cuda" else console.log_only
        tell("decoding", message=message)
    return BatchDecoder(model, sampling, vocabulary, console)


def _warn_of_float32(console: Console) -> None:
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        console.warn(
            "computes_in_float32",
            "This GPU has no bfloat16, so model.dtype=auto answers in float32, several times "
            "slower than in 16 bits: set model.dtype=float16",
        )


def _number_of_slots(
    model: Any,
    shape: CacheShape,
    prompts: int | Literal["auto"],
    in_all: int | None,
    sampling: Sampling,
) -> Callable[[int], int]:
    """Length of slots → how many there are to be."""
    if prompts != "auto" or model.device.type != "cuda":
        together = AUTO_PROMPTS if prompts == "auto" else prompts
        return lambda length: together * sampling.num_samples
    footprint = footprint_of(model, shape)
    memory = torch.cuda.get_device_properties(model.device).total_memory
    rows = None if in_all is None else in_all * sampling.num_samples
    return lambda length: footprint.slots_in(
        memory, length, samples=sampling.num_samples, rows=rows
    )
