"""A step as a CUDA graph, or as it is.

warm up on a stream of its own → record → replay once and compare with the step as it is. A step of
a large model is a thousand launches; replayed as a graph it is one, and takes half the time or less
(https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs). Where recording fails, the step runs
as it is: the same work by the same code, launch by launch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from medtrain.generate.slots.stepper import Stepper

_WARM_UP = 2
"""Steps before the watched one and the recording, in which libraries choose their kernels and take
their workspaces."""
TOLERANCES = {torch.float32: 1e-2, torch.float16: 0.1, torch.bfloat16: 0.2}
"""How far apart two ways to the same logits may lie by rounding, in standard deviations."""


class Run(Protocol):
    """Does steps."""

    why_not_recorded: str | None
    """None where it is a CUDA graph."""

    def __call__(self) -> None:
        """One step."""


class AsItIs:
    """A step, launch by launch."""

    def __init__(self, stepper: Stepper, why: str) -> None:
        self._stepper = stepper
        self.why_not_recorded: str | None = why

    def __call__(self) -> None:
        """One step."""
        self._stepper.step()


class Recorded:
    """A step as one launch."""

    why_not_recorded: str | None = None

    def __init__(self, stepper: Stepper) -> None:
        """Record a step; to be called while all slots are idle.

        Raises:
            RuntimeError: it cannot be recorded, or a replay gives something else.
        """
        with torch.cuda.device(stepper.tokens.device), _stream_kept():
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP):
                    stepper.step()
                # A recording that breaks off leaves PyTorch's allocator and its random numbers in
                # the middle of it; so what would break one off is found out before.
                with _waits_are_errors():
                    stepper.step()
            torch.cuda.current_stream().wait_stream(side)
            expected = stepper.logits.clone()
            self._graph = torch.cuda.CUDAGraph()
            # Other threads write journals and heartbeats meanwhile: only this one's calls count.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                stepper.step()
        self()
        apart = distance(stepper.logits, expected)
        if not apart <= TOLERANCES.get(expected.dtype, 0.2):
            raise RuntimeError(f"a replay's logits are {apart:.3g} standard deviations off")

    def __call__(self) -> None:
        """One step."""
        self._graph.replay()


def recorded(stepper: Stepper) -> Run:
    """Steps as a graph where that can be.

    Raises:
        torch.OutOfMemoryError: too little memory is left for it.
    """
    if not is_on_gpu(stepper):
        return AsItIs(stepper, "there is no GPU")
    try:
        return Recorded(stepper)
    except Exception as error:
        out_of_memory = _out_of_memory_in(error)
        if out_of_memory is not None:
            raise torch.OutOfMemoryError(str(out_of_memory)) from error
        return AsItIs(stepper, first_line(error))


def is_on_gpu(stepper: Stepper) -> bool:
    """Whether there are CUDA graphs for it."""
    return stepper.tokens.device.type == "cuda"


def distance(some: Tensor, others: Tensor) -> float:
    """How far apart logits lie, in standard deviations of the second; NaN where any is."""
    some, others = some.double(), others.double()
    return float((some - others).square().mean().sqrt() / others.std().clamp(min=1e-12))


def first_line(error: BaseException) -> str:
    """An error in a few words."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _out_of_memory_in(error: BaseException | None) -> BaseException | None:
    """A recording that runs out of memory fails once more where it is ended."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__cause__ or error.__context__
    return error


@contextmanager
def _waits_are_errors() -> Iterator[None]:
    """Raise a RuntimeError where the host would wait for the device."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def _stream_kept() -> Iterator[None]:
    """Come back to the current stream even from a recording that broke off."""
    before = torch.cuda.current_stream()
    try:
        yield
    finally:
        torch.cuda.set_stream(before)
