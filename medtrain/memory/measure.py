"""The most memory that a piece of work has alive, counted while it runs.

on a GPU PyTorch's allocator counts → torch.cuda.max_memory_allocated; on a CPU the profiler tells
of everything that PyTorch's allocator gives out and takes back, temporaries inside kernels
included → the highest sum. Both leave out what the allocator does not see: CUDA's context, NCCL,
and files that are mapped into memory.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch


class Measured(NamedTuple):
    """Bytes that PyTorch's allocator had given out."""

    before: int
    """When the work began; on a CPU what `resident` names."""
    peak: int
    """At most, while it ran."""


def measure(
    work: Callable[[], Any], device: torch.device, resident: Iterable[torch.Tensor] = ()
) -> Measured:
    """Run `work` and tell the most that was alive while it did.

    Args:
        work: what is measured.
        device: where it computes.
        resident: tensors that are there before it begins; needed on a CPU only, where nobody
            counts until the measurement starts.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return Measured(before, torch.cuda.max_memory_allocated(device))
    before = tensor_bytes(resident)
    gc.collect()  # what is given back later, and was there before, would count as less
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    return Measured(before, before + _highest(profile))


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the memory behind some tensors, each piece counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def model_tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers of a model, and the constants of its quantised weights."""
    found: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            found += [t for t in vars(state).values() if isinstance(t, torch.Tensor)]
            state = getattr(state, "state2", None)
    return found


def _highest(profile: Any) -> int:
    """The highest running sum of what was given out, less what was taken back."""
    events = (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
    sizes = [size for _, size in sorted((e.start_ns(), e.nbytes()) for e in events)]
    highest = alive = 0
    for size in sizes:
        alive += size
        highest = max(highest, alive)
    return highest
