"""Steps that the host does not wait for: what they came to is learnt two steps later.

A GPU is busy only while the host is ahead of it, and every number that the host reads makes it wait
for all that it has launched. So a step is judged on the device: loss and gradient are numbers → the
optimiser steps; else it leaves the step out whole, and its loss and figures count for nothing. The
numbers themselves, and whether any process was told to stop, are copied to page-locked memory and
read `LAG` steps later, or when a line is written or a checkpoint, where the host waits anyway.
All processes read the same numbers at the same step, so they go on or stop alike.

On a CPU nothing runs ahead: there every forward pass is judged before the next
(medtrain.train.guard).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.utils import DistributedType
from torch import Tensor

from medtrain.train.guard import LossGuard

LAG = 2
"""Steps that the host is ahead at most."""
DEVICES = ("cuda",)
"""Kinds of devices that the host runs ahead of."""
_STRATEGIES = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
"""DeepSpeed and FSDP wait for the device themselves."""


class Judged(NamedTuple):
    """A step that the host knows about."""

    step: int
    """Counted from 1."""
    loss: float
    """Mean of all processes."""
    norm: float
    """Of the gradient."""
    asked: bool
    """Whether any process was told to stop when it was launched."""
    rows: Sequence[int]
    """That this process had."""


class _Launched(NamedTuple):
    step: int
    rows: Sequence[int]
    numbers: Tensor
    """(3,) on the host: loss, norm and stop requests, once `copied` has happened."""
    copied: torch.cuda.Event | None


class Ahead:
    """The steps that were launched and not yet looked at."""

    def __init__(self, optimizer: Any, device: torch.device, processes: int) -> None:
        """None was launched.

        Args:
            optimizer: of PyTorch, one that `can_leave_out` is true of.
            device: where it steps.
            processes: that train together.
        """
        self._optimizer, self._device, self._processes = optimizer, device, processes
        self._launched: deque[_Launched] = deque()
        self._loss = self._asked = torch.zeros((), device=device)

    def loss(self, total: Tensor, *, asked: bool) -> Tensor:
        """Whether a step's loss, of all processes, is a number: (), on the device.

        A collective operation, but one that no process waits for.

        Args:
            total: () of this process.
            asked: whether this process was told to stop.
        """
        asked_here = torch.full((), float(asked), device=self._device)
        shared = torch.stack([total.detach().float(), asked_here])
        if self._processes > 1:
            torch.distributed.all_reduce(shared)
        self._loss, self._asked = shared[0] / self._processes, shared[1]
        return self._loss.isfinite()

    def launch(self, norm: Tensor, rows: Sequence[int], step: int) -> None:
        """Have the optimiser leave the step out if its loss or its gradient is no number.

        Args:
            norm: () of the gradient, the same in all processes.
            rows: of the step, in this process.
            step: its number.
        """
        good = self._loss.isfinite() & norm.isfinite()
        # As torch.amp.GradScaler tells it: fused kernels read it on the device.
        self._optimizer.found_inf = (~good).float()
        numbers = torch.stack([self._loss, norm.detach().float(), self._asked])
        self._launched.append(_Launched(step, rows, *_copied(numbers)))

    def known(self, *, all_of_them: bool = False) -> list[Judged]:
        """The steps that are `LAG` steps old, or all, the oldest first; each is given once."""
        found = []
        while len(self._launched) > (0 if all_of_them else LAG):
            step, rows, numbers, copied = self._launched.popleft()
            if copied is not None:
                copied.synchronize()
            loss, norm, asked = numbers.tolist()
            found.append(Judged(step, loss, norm, asked > 0, rows))
        return found


def watch(judged: Sequence[Judged], guard: LossGuard, whole: Callable[[], bool]) -> None:
    """Tell the guard what steps came to.

    Args:
        judged: the steps.
        guard: counts the bad ones.
        whole: whether the weights are numbers still; asked when a loss is none.

    Raises:
        MedtrainError: there were more bad ones than allowed; in all processes.
    """
    for each in judged:
        if not math.isfinite(each.loss):
            guard.bad_loss(each.rows, each.step, whole=whole())
            continue
        guard.step_done(each.loss, each.rows, each.step)
        if not math.isfinite(each.norm):
            guard.bad_gradient(each.rows, each.step)


def runs_ahead(trainer: Any) -> bool:
    """Whether a trainer's steps can be judged on the device: kind of device, strategy, optimiser.

    float16 has a scaler of losses that leaves steps out by itself.
    """
    return (
        trainer.args.device.type in DEVICES
        and trainer.accelerator.distributed_type in _STRATEGIES
        and not trainer.args.fp16
        and can_leave_out(bare(trainer.optimizer))
    )


def can_leave_out(optimizer: Any) -> bool:
    """Whether an optimiser can leave a step out without the host knowing: PyTorch's fused ones."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def bare(optimizer: Any) -> Any:
    """PyTorch's optimiser in accelerate's."""
    return getattr(optimizer, "optimizer", optimizer)


def _copied(numbers: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy on the host that is under way, and when it is there."""
    if not numbers.is_cuda:
        return numbers, None
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()
    return host, copied
