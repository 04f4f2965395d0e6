"""How a trainer goes through a step: what SFT's and the preference trainers change in TRL's loop.

To transformers, a "batch" is here a whole optimiser step (`StepBatch`): its forward passes, as few
as their tokens need, are run one after another and their gradients added up, and only the last one
is shared between processes. Losses that are no number are left out, requests to stop are agreed on,
and evaluations weigh every token (or pair) alike. On a GPU no step waits for what it computes: the
host reads batches ahead (medtrain.train.reading) and learns late what steps came to
(medtrain.train.ahead); only a line of metrics, an evaluation or a checkpoint makes it wait.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch
from accelerate.utils import DistributedType

from medtrain.train.ahead import Ahead, bare, runs_ahead, watch
from medtrain.train.evaluating import EvaluatingTrainer, Fed
from medtrain.train.figures import Figures
from medtrain.train.guard import LossGuard
from medtrain.train.loader import (
    Forward,
    StepBatch,
    StepLoader,
    forward_of,
    in_pinned_memory,
)
from medtrain.train.losses.computed import Computed
from medtrain.train.packed import PackedForward
from medtrain.train.preemption import StopRequest
from medtrain.train.reading import ReadAhead
from medtrain.train.speed import SpeedMeter

_READ_AHEAD_FOR = ("cuda",)
"""Kinds of devices that compute while the host reads."""


class StepTrainer(EvaluatingTrainer):
    """Mixed into TRL's trainers, before them."""

    model: Any
    model_wrapped: Any
    args: Any
    state: Any
    control: Any
    accelerator: Any
    train_dataset: Any
    optimizer: Any
    current_gradient_accumulation_steps: int

    def feed(self, fed: Fed, stop: StopRequest, guard: LossGuard, meter: SpeedMeter) -> None:
        """Take what training reads from, once TRL's constructor is through."""
        self.fed, self.stop, self.guard, self.meter = fed, stop, guard, meter
        self.stopped = False
        """Whether training ended because it was asked to."""
        self.figures = {mode: Figures(self.args.device) for mode in ("train", "eval")}
        self._last_good: Forward | None = None
        self._current: Forward | None = None
        self._ahead: Ahead | None = None
        """Set in the first step, where the host runs ahead of the device."""
        self._reading: ReadAhead[StepBatch] | None = None
        self._rows_of_step: list[int] = []

    # Reading

    def get_train_dataloader(self) -> Any:
        """The steps, dealt to processes already: accelerate must not deal them again."""
        return StepLoader(
            self.fed.dataset,
            self.fed.plan,
            self.fed.collate,
            process=self.accelerator.process_index,
            items=self.fed.items,
            workers=self.args.dataloader_num_workers,
        )

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[StepBatch], torch.Tensor | None]:
        """The next step, and its tokens with a loss in all processes."""
        began = time.perf_counter()
        batches = list(islice(self._read_ahead(epoch_iterator), num_batches))
        self.meter.waited(time.perf_counter() - began)
        counted = self.fed.items is not None and batches
        # Filled in on the device: a copy from the host would wait for it.
        return batches, torch.full((), batches[0].items, device=device) if counted else None

    def _read_ahead(self, steps: Any) -> Any:
        """An epoch's steps, by a thread where there is a GPU to keep busy meanwhile."""
        if self.args.device.type not in _READ_AHEAD_FOR:
            return steps
        if self._reading is None or self._reading.source is not steps:
            self._stop_reading()
            pin = self.args.dataloader_pin_memory and torch.cuda.is_available()
            self._reading = ReadAhead(
                steps, in_pinned_memory if pin else None, device=self.args.device
            )
        return self._reading

    def _stop_reading(self) -> None:
        if self._reading is not None:
            self._reading.close()
            self._reading = None

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Move to the device, and leave dtypes alone: DeepSpeed's dtype would round sums."""
        return _moved(inputs, self.args.device)

    def floating_point_ops(self, inputs: Any) -> int:
        """Counted by the meter."""
        return 0

    # Training

    def compute_loss_context_manager(self) -> Any:
        """The precision of forward passes, which accelerate does not see to under DeepSpeed."""
        contexts = super().compute_loss_context_manager()
        if self._is_deepspeed and self.fed.autocast is not None:
            contexts.enter_context(torch.autocast(self.args.device.type, self.fed.autocast))
        return contexts

    def training_step(
        self, model: Any, batch: StepBatch, num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run a step's forward and backward passes; the loss is this process's share."""
        if self._current is None:
            self._ahead = self._made_ahead()
        self.current_gradient_accumulation_steps = len(batch.forwards)
        total = torch.zeros((), device=self.args.device)
        for number, forward in enumerate(batch.forwards, start=1):
            last = number == len(batch.forwards)
            self._current = forward
            # DeepSpeed steps its optimiser in the backward pass that shares gradients.
            self.accelerator.gradient_state._set_sync_gradients(last)
            with nullcontext() if last or self._is_deepspeed else self.accelerator.no_sync(model):
                total += super().training_step(  # type: ignore[misc]
                    model, dict(forward.inputs), num_items_in_batch
                )
            self.meter.computed(forward)
        self._rows_of_step = [row for forward in batch.forwards for row in forward.rows]
        self.meter.step_done()
        return self._judged(total)

    def _made_ahead(self) -> Ahead | None:
        if not runs_ahead(self):
            return None
        return Ahead(bare(self.optimizer), self.args.device, self.accelerator.num_processes)

    def _judged(self, total: torch.Tensor) -> torch.Tensor:
        """A step's loss as it counts, in this process."""
        if self._ahead is None:
            mean = float(self.accelerator.reduce(total.detach(), reduction="mean"))
            self.guard.step_done(mean, self._rows_of_step, self.state.global_step + 1)
            return total
        good = self._ahead.loss(total, asked=self.stop.here)
        self.figures["train"].end_step(good)
        return torch.where(good, total, torch.zeros_like(total))

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss of a forward pass, packed where the inputs are; in training it is checked."""
        assert not return_outputs, "there are no logits"
        packed = PackedForward(model)
        computed = self.computed(packed, inputs, num_items_in_batch)
        if not self.model.training or self._current is None:
            self.figures["eval"].add(computed)
            return computed.loss
        if self._ahead is not None:
            self.figures["train"].add_to_step(computed)
            return computed.loss
        forward = self._current

        def instead() -> torch.Tensor:
            again = self._prepare_inputs(dict(self._good_forward(forward).inputs))
            # Dropout's draws go on as if this had not been: it depends on what came before.
            with torch.random.fork_rng(_gpus(self.args.device)):
                return self.computed(packed, again, num_items_in_batch).loss

        step = self.state.global_step + 1
        checked = self.guard.checked(computed.loss, forward.rows, instead, step)
        if checked is computed.loss:
            self._last_good = forward
            self.figures["train"].add(computed)
        return checked

    def computed(self, model: Any, inputs: Any, items: torch.Tensor | None) -> Computed:
        """The loss of a forward pass with its figures, nothing of which is read.

        Args:
            model: as it is wrapped for training, and called.
            inputs: of the pass, on the device.
            items: () tokens with a loss in the whole step, of all processes.
        """
        raise NotImplementedError

    def _good_forward(self, bad: Forward) -> Forward:
        """The last one whose loss was a number; before there is one, that of a row outside."""
        if self._last_good is not None:
            return self._last_good
        rows = (row for row in range(len(self.fed.dataset)) if row not in bad.rows)
        return forward_of(self.fed.dataset, [next(rows, 0)], self.fed.collate)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Leave out a gradient that is no number, as long as the guard allows it."""
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[misc]
        if self._ahead is not None:
            self._ahead.launch(norm, self._rows_of_step, self.state.global_step + 1)
        elif norm is not None and not bool(torch.isfinite(torch.as_tensor(norm))):
            self._leave_out_gradient()
        return norm

    def _leave_out_gradient(self) -> None:
        scaler = self.accelerator.scaler
        if self.args.fp16 and (scaler is None or scaler.get_scale() > 1):
            return  # the scaler leaves the step out and scales losses less
        self.guard.bad_gradient(self._rows_of_step, self.state.global_step + 1)
        if not self._is_deepspeed:  # which has done so, or the next loss will show it has not
            self.optimizer.zero_grad()

    def _learn_of_steps(self, *, all_of_them: bool) -> bool:
        """Look at the steps that the host ran ahead of; whether training is told to stop.

        Raises:
            MedtrainError: too many of them were bad.
        """
        known = [] if self._ahead is None else self._ahead.known(all_of_them=all_of_them)
        watch(known, self.guard, self._weights_are_numbers)
        if self._ahead is None or self.accelerator.num_processes == 1:
            return self.stop.agreed(self.args.device)
        return any(each.asked for each in known)

    def _weights_are_numbers(self) -> bool:
        trained = (p for p in self.model.parameters() if p.requires_grad)
        return all(bool(torch.isfinite(p).all()) for p in trained)

    @property
    def _is_deepspeed(self) -> bool:
        return bool(self.accelerator.distributed_type == DistributedType.DEEPSPEED)


def _gpus(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return value
