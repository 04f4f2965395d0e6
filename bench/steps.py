"""The parts `profile` and `waits` of bench/gpu.py: what the GPU does in a step, and what the host.

A training of medtrain, watched between two of its steps → GPU time by kind of kernel, how much of
the time it is busy, launches a step; and, by line of Python, where the host waits for the GPU.
"""

from __future__ import annotations

import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from random_llama import LLAMA_3_1B, LLAMA_3_8B, TINY
from record import Record, settle
from training import Setting, Training

if TYPE_CHECKING:
    from medtrain.run import Trained

KINDS = {
    "NF4 dequantising": ("quantize",),
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "wgrad", "sm90_x", "cublas"),
    "output layer's loss": ("logprob", "log_softmax", "selective"),
    "fused LoRA": ("lora",),
    "other compiled kernels": ("triton",),
    "optimizer": ("adam", "optim", "multi_tensor"),
    "copies, casts, elementwise": (
        "elementwise", "copy", "memcpy", "memset", "cat", "index", "reduce", "dropout", "gather",
        "scatter",
    ),
}  # fmt: skip
"""Kinds of kernels, by words in their names; the first that fits."""
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx")
_SHOWN = 25


def profile(record: Record) -> None:
    """Of steps of 4 rows and of 32, and of 4 pairs."""
    settings: list[tuple[Trained, Setting]] = [
        ("sft", Setting(LLAMA_3_8B, batch=4, accumulated=8)),
        ("sft", Setting(LLAMA_3_8B)),
        ("dpo", Setting(LLAMA_3_8B)),
    ]
    for stage, setting in settings:
        name = f"{stage} 8b {setting.batch} × {setting.accumulated} profile"

        def one(name: str = name, stage: Trained = stage, setting: Setting = setting) -> None:
            found = _profiled(stage, _sized(record, replace(setting, steps=6)))
            kinds = ", ".join(f"{kind} {share:.0%}" for kind, share in found["kinds"].items())
            record.figure(name, f"busy {found['busy']:.0%}, {found['launches_a_step']:,.0f} "
                          f"launches a step; {kinds}", **found)  # fmt: skip

        record.attempt(name, one, seconds=14)


def waits(record: Record) -> None:
    """Where the host waits, in steps between two lines of metrics."""
    import torch

    stages: tuple[Trained, ...] = ("sft", "dpo")
    for stage in stages:

        def one(stage: Trained = stage) -> None:
            setting = Setting(LLAMA_3_1B, steps=8, section={"log_every": 1000}, new_tokens=(5, 6))
            found = _waits(stage, _sized(record, setting))
            places = ", ".join(f"{place} {number:g}" for place, number in list(found.items())[:5])
            on_gpu = torch.cuda.is_available()
            said = f"{sum(found.values()):g} a step{': ' if places else ''}{places}"
            record.figure(f"{stage} waits of the host", said if on_gpu else "not told on a CPU",
                          places=found)  # fmt: skip

        record.attempt(f"{stage} waits", one, seconds=9)


def _sized(record: Record, setting: Setting) -> Setting:
    if not record.tiny:
        return setting
    return replace(setting, shape=TINY, batch=2, accumulated=1, max_length=512)


@contextmanager
def watched(
    first: int, last: int, begin: Callable[[], None], end: Callable[[], None]
) -> Iterator[None]:
    """Call `begin` before an optimiser step and `end` after another, counted from 1."""
    from transformers import TrainerCallback

    from medtrain.train.step import StepTrainer

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step + 1 == first:
                begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == last:
                end()

    feed = StepTrainer.feed

    def feed_watched(trainer: Any, *arguments: Any, **options: Any) -> None:
        feed(trainer, *arguments, **options)
        trainer.add_callback(Watch())

    with mock.patch.object(StepTrainer, "feed", feed_watched):
        yield


def _profiled(stage: Trained, setting: Setting) -> dict[str, Any]:
    """Steps 3 to 5 under PyTorch's profiler."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    profiler: Any = profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    )
    clock: list[float] = []

    def begin() -> None:
        settle()
        profiler.__enter__()
        clock.append(time.perf_counter())

    def end() -> None:
        settle()
        clock.append(time.perf_counter())
        profiler.__exit__(None, None, None)

    with tempfile.TemporaryDirectory() as directory, watched(3, 5, begin, end):
        Training(Path(directory), setting).medtrain(stage)
    events: Any = profiler.key_averages()
    computed = sorted(_kernels(events, on_gpu=on_gpu), key=lambda each: -each[1])
    total = sum(seconds for _, seconds in computed)
    launched = sum(event.count for event in events if event.key in _LAUNCHES)
    return {
        "busy": total / (clock[1] - clock[0]), "launches_a_step": launched / 3,
        "kinds": by_kind(computed),
        "longest": [(key[:110], round(s * 1e3, 2)) for key, s in computed[:_SHOWN]],
    }  # fmt: skip


def _kernels(events: Any, *, on_gpu: bool) -> list[tuple[str, float]]:
    """Names and seconds of the GPU's kernels, or of operators where there is none."""
    device_time = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    return [
        (event.key, getattr(event, device_time) / 1e6)
        for event in events
        if getattr(event, device_time) and (not on_gpu or "CUDA" in str(event.device_type))
    ]


def by_kind(computed: list[tuple[str, float]]) -> dict[str, float]:
    """Shares of the time, the largest first.

    Args:
        computed: names of kernels, and seconds.
    """
    shares: Counter[str] = Counter()
    for name, seconds in computed:
        fitting = (kind for kind, words in KINDS.items() if any(w in name.lower() for w in words))
        shares[next(fitting, "other")] += seconds  # type: ignore[assignment]
    total = sum(shares.values()) or 1.0
    return {kind: round(seconds / total, 3) for kind, seconds in shares.most_common()}


def _waits(stage: Trained, setting: Setting) -> dict[str, float]:
    """Steps 4 to 7: how often a step each line makes the host wait, the most frequent first."""
    import torch

    seen: Counter[str] = Counter()

    def note(message: Any, *arguments: Any, **options: Any) -> None:
        if "synchroniz" in str(message):
            seen[_place(traceback.extract_stack()[:-1])] += 1

    def mode(name: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode(name)

    with (
        tempfile.TemporaryDirectory() as directory,
        warnings.catch_warnings(),
        watched(4, 7, lambda: mode("warn"), lambda: mode("default")),
    ):
        warnings.simplefilter("always")
        warnings.showwarning = note
        Training(Path(directory), setting).medtrain(stage)
    return {place: number / 4 for place, number in seen.most_common(_SHOWN)}


def _place(stack: Any) -> str:
    """The innermost line outside PyTorch, and the one of medtrain that leads to it."""
    frames = [f for f in stack if "/torch/" not in f.filename and "warnings" not in f.filename]
    inner = frames[-1]
    ours = next((f for f in reversed(frames) if "/medtrain/" in f.filename), inner)

    def said(frame: Any) -> str:
        return f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno}"

    return said(inner) if ours is inner else f"{said(inner)} from {said(ours)}"
