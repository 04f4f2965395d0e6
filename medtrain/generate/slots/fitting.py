"""Which models slots are for, and a small try on the device before they are trusted.

what the configuration says → two short prompts through slots and batch by batch, the same tokens →
logits that agree → how much memory a slot takes. A model that does something of its own in its
attention fails here, and is decoded batch by batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from medtrain.generate.decode import Batch, Vocabulary
from medtrain.generate.forward import Forward
from medtrain.generate.sampling import Sampling
from medtrain.generate.slots.cache import CacheShape, SlotCache, windows_of
from medtrain.generate.slots.prompts import read
from medtrain.generate.slots.recorded import TOLERANCES, distance, first_line, recorded
from medtrain.generate.slots.sizes import Footprint, slot_length
from medtrain.generate.slots.stepper import GOING, Entry, Stepper

_PROMPT_LENGTHS = (23, 9)
_STEPS = 3


class Fit(NamedTuple):
    """What the try showed."""

    shape: CacheShape | None
    """What the model keeps of a token; None where slots are not for it."""
    why_not: str = ""
    surprising: bool = False
    """Whether the reason is one that nobody could know before."""


def why_not_slots(model: Any) -> str | None:
    """Why a model cannot be decoded in slots, as far as its configuration tells."""
    config = model.config.get_text_config(decoder=True)
    if getattr(model.config, "is_encoder_decoder", False):
        return "it has an encoder"
    if windows_of(model.config) is None:
        return f"{config.model_type} has layers that are not plain or sliding attention"
    if not getattr(model, "_supports_attention_backend", False):
        return f"{config.model_type} has an attention of its own"
    if _looks_at_the_longest(getattr(config, "rope_parameters", None)):
        return "its rotary embedding depends on the longest row of a batch"
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        return f"its weights lie on {len(devices)} devices"
    return None


def _looks_at_the_longest(rope: Any) -> bool:
    if not isinstance(rope, dict):
        return False
    kind = rope.get("rope_type")
    if kind is None:  # one set of parameters for each type of layer
        return any(_looks_at_the_longest(of_a_type) for of_a_type in rope.values())
    return "dynamic" in kind or kind == "longrope"


def try_slots(model: Any, sampling: Sampling, vocabulary: Vocabulary) -> Fit:
    """Decode two short prompts both ways and compare.

    Raises:
        torch.OutOfMemoryError: not even this fits.
    """
    why = why_not_slots(model)
    if why is not None:
        return Fit(None, why)
    try:
        return _compare(model, sampling, vocabulary)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return Fit(None, f"a first try failed ({first_line(error)})", surprising=True)


def footprint_of(model: Any, shape: CacheShape) -> Footprint:
    """What a model takes of a card."""
    config = model.config.get_text_config(decoder=True)
    stored = [*model.parameters(), *model.buffers()]
    return Footprint(
        weight_bytes=sum(tensor.numel() * tensor.element_size() for tensor in stored),
        token_bytes=shape.token_bytes,
        hidden=config.hidden_size,
        number_bytes=shape.dtype.itemsize,
        vocabulary=config.vocab_size,
    )


@torch.no_grad()
def _compare(model: Any, sampling: Sampling, vocabulary: Vocabulary) -> Fit:
    prompts = [[(7 * i + 3) % vocabulary.size for i in range(n)] for n in _PROMPT_LENGTHS]
    windows = windows_of(model.config)
    assert windows is not None
    forward, batch = Forward(model), Batch(model, prompts, vocabulary.pad)
    filled = read(forward, prompts, vocabulary.pad)
    shape = CacheShape.of(filled, windows)
    cache = SlotCache(shape, len(prompts), slot_length(max(_PROMPT_LENGTHS) + _STEPS))
    stepper = Stepper(forward, cache, sampling, vocabulary.size, ())
    run = recorded(stepper)
    limit = sampling.max_new_tokens
    entries = [Entry(i, p[-1], len(p), limit, np.zeros(0)) for i, p in enumerate(prompts)]
    stepper.enter(filled, entries, range(len(prompts)))
    positions = cache.positions.clone()
    for _ in range(_STEPS):
        run()
        apart = distance(stepper.logits, batch.logits)
        if not apart <= TOLERANCES.get(batch.logits.dtype, 0.2):
            why = f"its logits in slots are {apart:.3g} standard deviations off those in a batch"
            return Fit(None, why, surprising=True)
        # Both go on with the same tokens, whatever the slots have drawn.
        tokens = batch.logits[:, : vocabulary.size].argmax(dim=-1)
        batch.advance(tokens)
        positions += 1
        stepper.tokens.copy_(tokens)
        stepper.status.fill_(GOING)
        cache.positions.copy_(positions)
    return Fit(shape)
