"""How a trainer goes through a step: what SFT's and the preference trainers change in TRL's loop.

To transformers, a "batch" is here a whole optimiser step (`StepBatch`): its forward passes, as few
as their tokens need, are run one after another and their gradients added up, and only the last one
is shared between processes. Losses that are no number are left out, requests to stop are agreed on,
and evaluations weigh every token (or pair) alike.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import islice
from typing import Any, NamedTuple

import torch
from accelerate.utils import DistributedType
from transformers.trainer_utils import EvalLoopOutput

from medtrain.train.batches import BatchPlan
from medtrain.train.guard import LossGuard
from medtrain.train.loader import Collate, Forward, StepBatch, StepLoader, forward_of
from medtrain.train.packed import PackedForward
from medtrain.train.preemption import StopRequest
from medtrain.train.speed import SpeedMeter


class EvaluationStoppedError(Exception):
    """An evaluation was left in the middle, because training is to stop."""


class Fed(NamedTuple):
    """What a trainer is fed with."""

    dataset: Any
    """A datasets.Dataset of token ids."""
    validation: Any | None
    plan: BatchPlan
    collate: Collate
    ids: Sequence[str]
    """Of the dataset's rows."""
    items: Sequence[int] | None
    """Tokens with a loss of every row; None where the loss is a mean over rows."""
    eval_plan: BatchPlan | None
    eval_items: Sequence[int] | None = None
    autocast: torch.dtype | None = None
    """Precision of forward passes where weights are in another; None for theirs."""


class StepTrainer:
    """Mixed into TRL's trainers, before them."""

    model: Any
    model_wrapped: Any
    args: Any
    state: Any
    control: Any
    accelerator: Any
    train_dataset: Any
    current_gradient_accumulation_steps: int
    _metrics: dict[str, Any]
    _total_train_tokens: int

    def feed(self, fed: Fed, stop: StopRequest, guard: LossGuard, meter: SpeedMeter) -> None:
        """Take what training reads from, once TRL's constructor is through."""
        self.fed, self.stop, self.guard, self.meter = fed, stop, guard, meter
        self.stopped = False
        """Whether training ended because it was asked to."""
        self._last_good: Forward | None = None
        self._current: Forward | None = None

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

    def get_eval_dataloader(self, eval_dataset: Any = None) -> list[tuple[Forward, float]]:
        """This process's forward passes of an evaluation, and what each of them counts for."""
        plan = self.fed.eval_plan
        assert plan is not None, "there is no evaluation without validation rows"
        rows = list(range(len(plan.lengths)))
        shared, alone = (rows, []) if self.fed.items else plan.shared_and_alone(rows)
        dealt = plan.deal(shared)[self.accelerator.process_index] if shared else []
        counted = [(mine, self._weight(mine)) for mine in dealt]
        # All processes compute the few rows that cannot be dealt evenly, and each counts its share.
        counted += [([row], self._weight([row]) / plan.processes) for row in alone]
        return [
            (forward_of(self.fed.validation, mine, self.fed.collate), weight)
            for mine, weight in counted
        ]

    def _weight(self, rows: Sequence[int]) -> float:
        items = self.fed.eval_items
        return float(sum(items[row] for row in rows) if items is not None else len(rows))

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[StepBatch], torch.Tensor | None]:
        """The next step, and its tokens with a loss in all processes."""
        began = time.perf_counter()
        batches = list(islice(epoch_iterator, num_batches))
        self.meter.waited(time.perf_counter() - began)
        counted = self.fed.items is not None and batches
        return batches, torch.tensor(batches[0].items, device=device) if counted else None

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Move to the device, and leave dtypes alone: DeepSpeed's dtype would round sums."""
        return _moved(inputs, self.args.device)

    def floating_point_ops(self, inputs: Any) -> int:
        """Counted by the meter."""
        return 0

    # Training

    def compute_loss_context_manager(self) -> Any:
        """The precision of forward passes, which accelerate does not see to under DeepSpeed."""
        contexts = super().compute_loss_context_manager()  # type: ignore[misc]
        if self._is_deepspeed and self.fed.autocast is not None:
            contexts.enter_context(torch.autocast(self.args.device.type, self.fed.autocast))
        return contexts

    def training_step(
        self, model: Any, batch: StepBatch, num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run a step's forward and backward passes; the loss is this process's share."""
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
        mean = self._mean_over_processes(total)
        self.guard.step_done(mean, self._rows_of_step, self.state.global_step + 1)
        self.meter.step_done()
        return total

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """TRL's loss of a forward pass, packed where the inputs are; in training it is checked."""
        computed = super().compute_loss  # type: ignore[misc]
        packed = PackedForward(model)
        if not self.model.training or self._current is None:
            return computed(packed, inputs, return_outputs, num_items_in_batch)
        forward = self._current
        before = self._figures_known()

        def instead() -> torch.Tensor:
            again = self._prepare_inputs(dict(self._good_forward(forward).inputs))
            # Dropout's draws go on as if this had not been: it depends on what came before.
            with torch.random.fork_rng(_gpus(self.args.device)):
                result: torch.Tensor = computed(
                    packed, again, num_items_in_batch=num_items_in_batch
                )
            return result

        loss = computed(packed, inputs, return_outputs, num_items_in_batch)
        checked = self.guard.checked(loss, forward.rows, instead, self.state.global_step + 1)
        if checked is loss:
            self._last_good = forward
        else:
            self._forget_figures(*before)
        return checked

    def _figures_known(self) -> tuple[dict[str, int], int]:
        """How many figures of each kind TRL's loss has noted, and how many tokens."""
        kept = self._metrics["train"]
        return {name: len(figures) for name, figures in kept.items()}, self._total_train_tokens

    def _forget_figures(self, known: dict[str, int], tokens: int) -> None:
        """Forget what a batch that is left out has added: a mean with it would be no number."""
        kept = self._metrics["train"]
        for name in list(kept):
            kept[name] = kept[name][: known.get(name, 0)]
            if not kept[name]:
                del kept[name]
        if "num_tokens" in kept:
            kept["num_tokens"] = [tokens]
        self._total_train_tokens = tokens

    def _good_forward(self, bad: Forward) -> Forward:
        """The last one whose loss was a number; before there is one, that of a row outside."""
        if self._last_good is not None:
            return self._last_good
        rows = (row for row in range(len(self.fed.dataset)) if row not in bad.rows)
        return forward_of(self.fed.dataset, [next(rows, 0)], self.fed.collate)

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip, and leave out a gradient that is no number, as long as the guard allows it."""
        norm = super()._clip_grad_norm(model)  # type: ignore[misc]
        if norm is not None and not bool(torch.isfinite(torch.as_tensor(norm))):
            scaler = self.accelerator.scaler
            if self.args.fp16 and (scaler is None or scaler.get_scale() > 1):
                return norm  # the scaler leaves the step out and scales losses less
            self.guard.bad_gradient(self._rows_of_step, self.state.global_step + 1)
            if self._is_deepspeed:
                return norm  # it has left the step out, or the next loss will show that it has not
            self.optimizer.zero_grad()  # type: ignore[attr-defined]
        return norm

    @property
    def _is_deepspeed(self) -> bool:
        return bool(self.accelerator.distributed_type == DistributedType.DEEPSPEED)

    def _mean_over_processes(self, loss: torch.Tensor) -> float:
        return float(self.accelerator.reduce(loss.detach(), reduction="mean"))

    # Evaluating

    def evaluation_loop(
        self,
        dataloader: list[tuple[Forward, float]],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The mean loss of a token, or of a pair, over all validation rows.

        Raises:
            EvaluationStoppedError: training is to stop; in all processes.
        """
        model = self.model_wrapped
        model.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        for forward, weight in dataloader:
            if self.stop.agreed(self.args.device):
                raise EvaluationStoppedError
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = self.compute_loss(model, self._prepare_inputs(dict(forward.inputs)))
            if weight:
                sums += torch.tensor([float(loss) * weight, weight], dtype=torch.float64)
        total = self.accelerator.reduce(sums.to(self.args.device), reduction="sum")
        rows = len(self.fed.eval_plan.lengths) if self.fed.eval_plan else 0
        return EvalLoopOutput(
            predictions=None,
            label_ids=None,
            metrics={f"{metric_key_prefix}_loss": float(total[0] / total[1])},
            num_samples=rows,
        )


def _gpus(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return value
