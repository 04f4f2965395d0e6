"""How fast a training goes, and what it spends its time and memory on.

forward passes and waiting → sums since the last line of metrics → tokens a second of all processes,
padding, time of a step, time spent waiting for data, peak memory, and the share of the GPU's peak
arithmetic that useful work makes up (MFU).

A frozen weight costs 2 FLOPs a token forward and 2 for the gradient of its inputs; only adapters,
which are left out as small, have gradients of their own (Hu et al. 2021,
https://arxiv.org/abs/2106.09685). What activation checkpointing computes again is no useful work.
"""

from __future__ import annotations

import resource
import time
from typing import Any

import torch

from medtrain.train.loader import Forward
from medtrain.train.preemption import greatest

SPEED_FIGURES = (
    "tokens_per_s", "padding", "step_s", "data_wait_s", "memory_peak_bytes", "mfu",
)  # fmt: skip
"""What a line of metrics says of speed."""
_FLOPS_A_WEIGHT_AND_TOKEN = 4.0
_CPU = torch.device("cpu")


class SpeedMeter:
    """Sums since the last line of metrics."""

    def __init__(
        self,
        weights: float,
        processes: int,
        peak_flops: float | None,
        device: torch.device = _CPU,
    ) -> None:
        """Start the clock.

        Args:
            weights: of the model, embeddings left out.
            processes: that train together; tokens of the others are taken to be as many.
            peak_flops: of one device, FLOP/s; None where nobody knows.
            device: where figures are shared between processes.
        """
        self._weights, self._processes, self._peak_flops = weights, processes, peak_flops
        self._device = device
        self._start_anew()

    def waited(self, seconds: float) -> None:
        """Count time in which no batch was there."""
        self._waited_s += seconds

    def computed(self, forward: Forward) -> None:
        """Count a forward pass and its backward pass."""
        if forward.rows:
            self._tokens += int(forward.inputs["attention_mask"].sum())
        packed = forward.inputs.get("packed")
        shape = packed["position_ids"] if packed else forward.inputs["input_ids"]
        self._positions += shape.numel()

    def step_done(self) -> None:
        """Count a step."""
        self._steps += 1

    def paused(self, seconds: float) -> None:
        """Leave out time that was spent on evaluating and saving."""
        self._since += seconds

    def line(self) -> dict[str, Any]:
        """The figures since the last call, for a line of metrics; empty without a step.

        A collective operation: all processes must ask at the same point. The peak of memory is that
        of the fullest one, since it started.
        """
        if not self._steps:
            return {}
        seconds = max(time.perf_counter() - self._since, 1e-9)
        a_second = self._tokens / seconds
        figures: dict[str, Any] = {
            "tokens_per_s": round(a_second * self._processes, 1),
            "padding": round(1 - self._tokens / self._positions, 4),
            "step_s": round(seconds / self._steps, 4),
            "data_wait_s": round(self._waited_s / self._steps, 4),
            "memory_peak_bytes": greatest(memory_peak(), self._device),
        }
        if self._peak_flops:
            flops = _FLOPS_A_WEIGHT_AND_TOKEN * self._weights * a_second
            figures["mfu"] = round(flops / self._peak_flops, 4)
        self._start_anew()
        return figures

    def _start_anew(self) -> None:
        self._since = time.perf_counter()
        self._waited_s, self._tokens, self._positions, self._steps = 0.0, 0, 0, 0


def memory_peak() -> int:
    """Bytes at most allocated on the GPU, or resident in this process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
