"""The moment in which a resumed training stands as it stood when its checkpoint was written.

model, optimiser and schedule loaded by the trainer → the sums of the metrics since their last line
→ an evaluation that was due and was interrupted, done now and added to the checkpoint → nothing
left to train, or on.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from medtrain.train import checkpoints
from medtrain.train.checkpoints import Checkpoint


class NothingLeftError(Exception):
    """The evaluation that was left over was the last thing to be done."""


class GoingOn(TrainerCallback):  # type: ignore[misc]
    """Brings back what transformers does not, before the first step."""

    def __init__(self, trainer: Any, start: Checkpoint | None) -> None:
        """`start` is None where training begins."""
        self._trainer, self._start = trainer, start

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore, and evaluate where that is what comes next.

        Raises:
            NothingLeftError: nothing is left to be done.
            EvaluationStoppedError: training is to stop already.
        """
        trainer, start = self._trainer, self._start
        if start is None:
            return
        if start.plan.processes == trainer.plan.processes:  # else they are shares of others
            trainer.restore_sums(start.path)
        if start.evaluated:
            return
        trainer.evaluate()
        ended = control.should_training_stop or state.global_step >= state.max_steps
        if args.should_save:
            whole = start._replace(finished=ended)
            checkpoints.rewrite_history(whole, state.log_history)
            checkpoints.prune_to_best(start.path.parent, start.step, state.log_history)
        trainer.accelerator.wait_for_everyone()
        if ended:
            raise NothingLeftError
        trainer.model.train()
