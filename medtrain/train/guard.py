"""What a loss or a gradient that is no number does: a few are left out, more stop the training.

loss of a forward pass → finite in all processes? → else the pass counts for nothing: its loss is
that of a good one times zero, so that gradients are zeros and every process still takes part
in what the others do. On a GPU nobody waits for the loss of a pass: there the whole step is left
out (medtrain.train.ahead), and is counted here when it is known. A loss far above those before it
counts as bad too, but is not left out. After `max_bad_batches` training stops and names the rows.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch

from medtrain.errors import MedtrainError
from medtrain.train.preemption import any_process

_SEEN, _EXPLODED = 50, 10.0
"""A loss explodes that is this many times the median of as many steps before it."""
_WARM_UP = 10
_MANY = {"batch": "batches", "step": "steps"}
_NAMED = 16
"""Rows that a message names."""


class LossGuard:
    """The bad batches of one training."""

    def __init__(self, stage: str, ids: Sequence[str], allowed: int, device: torch.device) -> None:
        """None was bad yet.

        Args:
            stage: for the message.
            ids: the training rows' ids.
            allowed: bad batches that do not stop the training.
            device: where flags are shared between processes.
        """
        self._stage, self._ids, self._allowed, self._device = stage, ids, allowed, device
        self._losses: deque[float] = deque(maxlen=_SEEN)
        self._bad_rows: list[str] = []
        self.bad = 0
        """Batches so far."""

    def checked(
        self,
        loss: torch.Tensor,
        rows: Sequence[int],
        instead: Callable[[], torch.Tensor],
        step: int,
    ) -> torch.Tensor:
        """The loss, or a zero that can be differentiated where it is no number in any process.

        Args:
            loss: of this process's forward pass.
            rows: that it had.
            instead: computes the loss of another batch, one known to be good if there is any.
            step: for the message.

        Raises:
            MedtrainError: there were more bad batches than allowed; in all processes.
        """
        if not any_process(not bool(torch.isfinite(loss)), self._device):
            return loss
        self._note(rows, step, f"The loss was no number in {{}} of {self._stage}", "batch")
        other = instead()
        if any_process(not bool(torch.isfinite(other)), self._device):
            raise self._stop(
                step,
                f"The weights of {self._stage} have become no numbers" if step > 1
                else f"The first losses of {self._stage} are no numbers",
            )  # fmt: skip
        return other * 0.0

    def bad_loss(self, rows: Sequence[int], step: int, *, whole: bool) -> None:
        """Count a step that was left out whole, since its loss was no number in some process.

        Args:
            rows: that this process had of it.
            step: its number.
            whole: whether the weights are numbers; where they are not no later loss will be one.

        Raises:
            MedtrainError: there were more bad steps than allowed, or the weights are broken.
        """
        if not whole:
            self._bad_rows += [self._ids[row] for row in self._everybodys(rows)]
            raise self._stop(step, f"The weights of {self._stage} have become no numbers")
        never = not self._losses and self.bad == self._allowed > 0
        self._note(
            rows, step,
            f"The first losses of {self._stage} are no numbers" if never
            else f"The loss was no number in {{}} of {self._stage}",
            "step",
        )  # fmt: skip

    def step_done(self, loss: float, rows: Sequence[int], step: int) -> None:
        """Look at the mean loss of a step, which must be the same in all processes.

        Raises:
            MedtrainError: the loss has exploded too often.
        """
        usual = median(self._losses) if len(self._losses) >= _WARM_UP else math.inf
        if loss > max(_EXPLODED * abs(usual), usual + 1.0):
            self._note(rows, step, f"The loss of {self._stage} was over {_EXPLODED:g} times the "
                       "usual in {}", "step")  # fmt: skip
        else:
            self._losses.append(loss)

    def bad_gradient(self, rows: Sequence[int], step: int) -> None:
        """Count a gradient that is no number, which must be so in all processes.

        Raises:
            MedtrainError: there were too many.
        """
        self._note(rows, step, f"The gradient was no number in {{}} of {self._stage}", "step")

    def sums(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, so that a resumed training is as patient as this one."""
        return {"bad": self.bad, "bad_rows": self._bad_rows, "losses": list(self._losses)}

    def restore(self, sums: Mapping[str, Any]) -> None:
        """Go on from `sums`."""
        self.bad, self._bad_rows = sums["bad"], list(sums["bad_rows"])
        self._losses.extend(sums["losses"])

    def _note(self, rows: Sequence[int], step: int, what: str, of: str) -> None:
        self.bad += 1
        self._bad_rows += [self._ids[row] for row in self._everybodys(rows)]
        if self.bad > self._allowed:
            raise self._stop(step, what.format(f"{self.bad} {of if self.bad == 1 else _MANY[of]}"))

    def _everybodys(self, rows: Sequence[int]) -> list[int]:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return list(rows)
        gathered: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, list(rows))
        return [row for each in gathered for row in each]

    def _stop(self, step: int, what: str) -> MedtrainError:
        named = list(dict.fromkeys(self._bad_rows))
        more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
        return MedtrainError(
            f"{what}, up to step {step}. The rows: {', '.join(named[:_NAMED])}{more}",
            fix=f"Look at these rows; lower {self._stage}.learning_rate; prefer "
            "model.dtype=bfloat16 or float32 to float16. The last checkpoint is whole.",
        )
