"""The slots' keys and values, and those of prompts on their way there.

A unit's prompts are run padded on the right, which needs no mask: a prompt's tokens look back only.
Their keys and values are then copied, once for every sample, to the front of slots. What lies in a
slot behind its row's position is never looked at, and overwritten as the row goes on.
"""

from __future__ import annotations

import math
from collections import Counter
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

Size = tuple[int, int]
"""Heads, head size."""


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


class PromptCache(DynamicCache):  # type: ignore[misc]
    """For one pass over prompts padded on the right."""

    layers: list[PromptLayer]

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.layers = [PromptLayer(is_sliding=layer.is_sliding) for layer in self.layers]
        self.stacks: dict[Size, Tensor] = {}
        """Once they are filled: keys and values of all layers, (tensors, prompts, heads, longest,
        head size), by size and in the order of the layers, a layer's keys first."""

    def stack(self) -> None:
        """Lay what the pass left into few tensors: copied at once, and not layer by layer."""
        kept = [tensor for layer in self.layers for tensor in (layer.keys, layer.values)]
        for size in dict.fromkeys(map(_size, kept)):
            self.stacks[size] = torch.stack([tensor for tensor in kept if _size(tensor) == size])
        views = {size: iter(stack) for size, stack in self.stacks.items()}
        for layer in self.layers:  # what was stacked is let go
            layer.keys = next(views[_size(layer.keys)])
            layer.values = next(views[_size(layer.values)])


def _size(kept: Tensor) -> Size:
    return kept.shape[1], kept.shape[3]


class LayerShape(NamedTuple):
    """What a layer keeps of a token."""

    keys: Size
    values: Size
    window: int | None
    """Positions that a token looks back at, itself counted; None for all."""


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What a model keeps of a token."""

    layers: tuple[LayerShape, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, prompts: PromptCache, windows: Sequence[int | None]) -> CacheShape:
        """As a pass over any prompt left it."""
        layers = [
            LayerShape(_size(layer.keys), _size(layer.values), window)
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
        rows = torch.arange(slots, device=shape.device)
        self.positions = torch.zeros_like(rows)
        """(slots,) int64: where each slot's next token goes."""
        sizes = Counter(size for kept in shape.layers for size in (kept.keys, kept.values))
        # Zeros: a slot that was never used is computed with too, and must hold numbers.
        self._stacks = {
            (heads, size): torch.zeros(
                (tensors, slots, heads, length, size), dtype=shape.dtype, device=shape.device
            )
            for (heads, size), tensors in sizes.items()
        }
        buffers = {size: iter(stack) for size, stack in self._stacks.items()}
        super().__init__(
            layers=[
                SlotLayer(
                    next(buffers[kept.keys]),
                    next(buffers[kept.values]),
                    kept.window,
                    rows,
                    self.positions,
                )
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

    def take(self, prompts: PromptCache, rows: Tensor, slots: Tensor) -> None:
        """Copy prompts' keys and values to the front of slots.

        Args:
            prompts: as they were run and stacked; not longer than a slot.
            rows: (n,) int64, which prompt goes …
            slots: (n,) int64, … where.
        """
        for size, source in prompts.stacks.items():
            self._stacks[size][:, slots, :, : source.shape[3]] = source[:, rows]


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
