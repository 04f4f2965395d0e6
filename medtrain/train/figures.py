"""The figures of a line of metrics while they are being made: sums that stay on the device.

losses and figures of forward passes → sums, of good passes or of whole steps that turn out good →
at a line: added up over processes, read once, divided. A checkpoint keeps the sums, so that a line
is the same whether training was interrupted before it or not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from medtrain.train.losses.computed import Computed, Sum


class Figures:
    """Sums since the last line, of this process."""

    def __init__(self, device: torch.device) -> None:
        """Nothing was summed yet; `device` is where losses are."""
        self._device = device
        self.clear()

    def clear(self) -> None:
        """Begin the next line."""
        self._names: tuple[str, ...] = ()
        self._sums: Tensor | None = None
        """(2 names + 1,): sums, then counts, then tokens; float64."""
        self._step: Tensor | None = None

    def add(self, computed: Computed) -> None:
        """Count a forward pass."""
        self._sums = _plus(self._sums, self._of(computed))

    def add_to_step(self, computed: Computed) -> None:
        """Count a forward pass once its step turns out to be good."""
        self._step = _plus(self._step, self._of(computed))

    def end_step(self, good: Tensor) -> None:
        """Count the passes of the step if `good`, (), is true on the device."""
        if self._step is not None:
            kept = torch.where(good, self._step, torch.zeros_like(self._step))
            self._sums, self._step = _plus(self._sums, kept), None

    def line(self) -> tuple[dict[str, float], int]:
        """The means of all processes, and their tokens.

        A collective operation, and the only one that waits for the device.
        """
        if self._sums is None:
            return {}, 0
        shared = self._sums.clone()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(shared)
        *numbers, tokens = shared.tolist()
        count = len(self._names)
        means = zip(self._names, numbers[:count], numbers[count:], strict=True)
        return {name: sum_ / of if of else 0.0 for name, sum_, of in means}, int(tokens)

    def sums(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        known = [] if self._sums is None else self._sums.tolist()
        return {"names": list(self._names), "sums": known}

    def restore(self, sums: Mapping[str, Any]) -> None:
        """Go on from `sums`."""
        if sums.get("sums"):
            self._names = tuple(sums["names"])
            self._sums = torch.tensor(sums["sums"], dtype=torch.float64, device=self._device)

    def _of(self, computed: Computed) -> Tensor:
        names = tuple(computed.figures)
        assert self._names in ((), names), f"a line is about {self._names}, not {names}"
        self._names = names
        ratios = computed.figures.values()
        numbers = [*(r.total for r in ratios), *(r.of for r in ratios), computed.tokens]
        return _vector(numbers, self._device)


def _plus(sums: Tensor | None, more: Tensor) -> Tensor:
    return more if sums is None else sums + more


def _vector(numbers: Sequence[Sum], device: torch.device) -> Tensor:
    """(n,) float64; a number that the host knows is filled in, for copying it would wait."""
    parts = [
        number.detach().float() if isinstance(number, Tensor)
        else torch.full((), number, dtype=torch.float32, device=device)
        for number in numbers
    ]  # fmt: skip
    return torch.stack(parts).double()
