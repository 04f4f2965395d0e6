"""The slots' keys and values, and those of prompts on their way there.

A unit's prompts are run padded on the right, which needs no mask: a prompt's tokens look back only.
Their keys and values are then copied, once for every sample, to the front of slots. What lies in a
slot behind its row's position is never looked at, and overwritten as the row goes on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)


class PromptLayer(DynamicLayer):  # type: ignore[misc]  # transformers is not typed
    """One pass's keys and values as the model made them: (prompts, heads, longest, head size).

    A layer with a window keeps all of them too; what it may look at is the mask's affair.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, *, is_sliding: bool) -> None:
        super().__init__()
        self.is_sliding = is_sliding

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take the only pass."""
        self.lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states, value_states
        return key_states, value_states


class LayerShape(NamedTuple):
    """What a layer keeps of a token."""

    keys: tuple[int, int]
    """Heads, head size."""
    values: tuple[int, int]
    window: int | None
    """Positions that a token looks back at, itself counted; None for all."""


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What a model keeps of a token."""

    layers: tuple[LayerShape, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, prompts: DynamicCache, windows: Sequence[int | None]) -> CacheShape:
        """As a pass over any prompt left it."""
        layers = [
            LayerShape(
                (layer.keys.shape[1], layer.keys.shape[3]),
                (layer.values.shape[1], layer.values.shape[3]),
                window,
            )
            for layer, window in zip(prompts.layers, windows, strict=True)
        ]
        first = prompts.layers[0].keys
        return cls(tuple(layers), first.dtype, first.device)

    @property
    def token_bytes(self) -> int:
        """Of a token's keys and values, all layers."""
        numbers = sum(math.prod(layer.keys) + math.prod(layer.values) for layer in self.layers)
        return numbers * self.dtype.itemsize


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """A layer's slots: keys and values (slots, heads, length, head size), written in place."""

    keys: Tensor
    values: Tensor

    def __init__(
        self, keys: Tensor, values: Tensor, window: int | None, rows: Tensor, positions: Tensor
    ) -> None:
        """Over buffers, which are changed in place.

        Args:
            keys: (slots, heads, length, head size).
            values: likewise.
            window: see `LayerShape`.
            rows: (slots,) int64, 0, 1, 2, …
            positions: (slots,) int64, where each slot's next token goes.
        """
        super().__init__()
        self.window, self.is_sliding, self.is_initialized = window, window is not None, True
        self.keys, self.values = keys, values
        self._rows, self._positions = rows, positions

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the buffers are there."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Put one new token of every slot, (slots, heads, 1, head size), at the slot's position."""
        self.keys[self._rows, :, self._positions] = key_states[:, :, 0]
        self.values[self._rows, :, self._positions] = value_states[:, :, 0]
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a query meets, and the first one's position."""
        return self.keys.shape[2], 0

    def get_seq_length(self) -> int:
        """Nobody's length: every slot has its own."""
        return 0

    def get_max_length(self) -> int:
        """Positions of a slot."""
        return self.keys.shape[2]

    get_max_cache_shape = get_max_length  # its name until transformers 5.20


class SlotCache(Cache):  # type: ignore[misc]
    """All layers' slots."""

    layers: list[SlotLayer]

    def __init__(self, shape: CacheShape, slots: int, length: int) -> None:
        """Empty slots, `slots` of `length` positions."""

        # Zeros: a slot that was never used is computed with too, and must hold numbers.
        def zeros(heads: int, size: int) -> Tensor:
            where = (slots, heads, length, size)
            return torch.zeros(where, dtype=shape.dtype, device=shape.device)

        rows = torch.arange(slots, device=shape.device)
        self.positions = torch.zeros_like(rows)
        """(slots,) int64: where each slot's next token goes."""
        super().__init__(
            layers=[
                SlotLayer(zeros(*kept.keys), zeros(*kept.values), kept.window, rows, self.positions)
                for kept in shape.layers
            ]
        )
        self._dtype = shape.dtype
        self._columns = torch.arange(length, device=shape.device)
        self._windows = frozenset(kept.window for kept in shape.layers)
        # Not -inf: a kernel that begins with a block in which all is hidden would make NaN.
        self._hidden = -3e4 if shape.dtype == torch.float16 else -1e30
        self.masks: dict[int | None, Tensor] = {}
        """By window: (slots, 1, 1, length), to be added to scores; made anew for every step."""

    def look_from_here(self) -> None:
        """Make the masks of a step: every slot's token sees its own past, and itself."""
        here = self.positions[:, None]
        for window in self._windows:
            seen = self._columns <= here
            if window is not None:
                seen &= self._columns > here - window
            mask = torch.where(seen, 0.0, self._hidden).to(self._dtype)
            self.masks[window] = mask[:, None, None, :]

    def take(self, prompts: DynamicCache, rows: Tensor, slots: Tensor) -> None:
        """Copy prompts' keys and values to the front of slots.

        Args:
            prompts: as they were run; not longer than a slot.
            rows: (n,) int64, which prompt goes …
            slots: (n,) int64, … where.
        """
        for source, target in zip(prompts.layers, self.layers, strict=True):
            longest = source.keys.shape[2]
            target.keys[slots, :, :longest] = source.keys[rows]
            target.values[slots, :, :longest] = source.values[rows]


def prompt_cache(config: Any) -> DynamicCache:
    """An empty cache for one pass over prompts padded on the right."""
    cache = DynamicCache(config=config)
    cache.layers = [PromptLayer(is_sliding=layer.is_sliding) for layer in cache.layers]
    return cache


def windows_of(config: Any) -> tuple[int | None, ...] | None:
    """Each layer's window; None where a layer is not plain attention over what went before."""
    layers = DynamicCache(config=config).layers
    text = config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None) or ["attention"] * len(layers)
    if not layers or any("chunked" in kind for kind in kinds):
        return None
    if getattr(text, "attention_chunk_size", None) is not None:
        return None
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return None
    return tuple(getattr(layer, "sliding_window", None) for layer in layers)
