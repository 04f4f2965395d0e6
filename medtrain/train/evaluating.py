"""What a trainer is fed with, and how it evaluates: every token, or pair, counts alike.

validation rows → forward passes dealt to processes, each with what it counts for → sums on the
device → one mean, the same in all processes. Between passes they agree on requests to stop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers.trainer_utils import EvalLoopOutput

from medtrain.train.batches import BatchPlan
from medtrain.train.loader import Collate, Forward, forward_of
from medtrain.train.preemption import StopRequest


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


class EvaluatingTrainer:
    """The part of medtrain.train.step.StepTrainer that learns nothing."""

    model_wrapped: Any
    args: Any
    accelerator: Any
    compute_loss: Any
    compute_loss_context_manager: Any
    _prepare_inputs: Any
    fed: Fed
    stop: StopRequest

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
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for forward, weight in dataloader:
            if self.stop.agreed(self.args.device):
                raise EvaluationStoppedError
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = self.compute_loss(model, self._prepare_inputs(dict(forward.inputs)))
            if weight:
                ones = torch.ones_like(loss, dtype=torch.float64)
                sums += torch.stack([loss.double(), ones]) * weight
        total = self.accelerator.reduce(sums, reduction="sum")
        rows = len(self.fed.eval_plan.lengths) if self.fed.eval_plan else 0
        return EvalLoopOutput(
            predictions=None,
            label_ids=None,
            metrics={f"{metric_key_prefix}_loss": float(total[0] / total[1])},
            num_samples=rows,
        )
