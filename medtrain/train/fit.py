"""What SFT and DPO do alike once a trainer stands: go on or begin, train, choose, publish.

whole checkpoint that fits the plan? → go on from it, else begin anew → train with telemetry → the
best checkpoint (or the last) → <stage>/adapter. Training that had finished before the process died
is not done again: its checkpoint is published.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from accelerate.utils import broadcast_object_list
from trl.trainer.utils import get_peak_flops_per_device

from medtrain.config import RunConfig
from medtrain.console import Console
from medtrain.errors import (
    DataError,
    MedtrainError,
    StoppedError,
    TryAgainError,
    from_exit_code,
)
from medtrain.gpus import gpu_named
from medtrain.run import Run, Trained
from medtrain.train import checkpoints
from medtrain.train.adapter import AdapterFacts, read_weights
from medtrain.train.checkpoints import Checkpoint, Plan
from medtrain.train.continuing import continues, difference
from medtrain.train.evaluating import EvaluationStoppedError, Fed
from medtrain.train.going_on import GoingOn, NothingLeftError
from medtrain.train.guard import LossGuard
from medtrain.train.model import compute_dtype, out_of_memory
from medtrain.train.preemption import StopRequest
from medtrain.train.speed import SpeedMeter
from medtrain.train.telemetry import Telemetry, keep_metrics_until

if TYPE_CHECKING:
    from medtrain.data.chat import ChatTokenizer

_T = TypeVar("_T")
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


@dataclass(frozen=True)
class Fit:
    """One training of one stage."""

    run: Run
    config: RunConfig
    stage: Trained
    chat: ChatTokenizer
    plan: Plan
    console: Console

    stop: StopRequest = field(default_factory=StopRequest)

    def feed(self, trainer: Any, fed: Fed) -> None:
        """Give a trainer what it reads, and what watches over it."""
        device = trainer.args.device
        section = getattr(self.config, self.stage)
        model = trainer.model.get_base_model()
        dtype, peak = compute_dtype(self.config), None
        if torch.cuda.is_available():
            name = str(dtype).removeprefix("torch.")
            peak = get_peak_flops_per_device(trainer.accelerator, name)
            if peak is None and (gpu := gpu_named(torch.cuda.get_device_name(device))):
                peak = gpu.flops(name)
        rounded = dtype == torch.bfloat16 and self.plan.strategy.startswith("zero")
        trainer.feed(
            fed._replace(autocast=dtype if rounded else None),
            self.stop,
            LossGuard(self.stage, fed.ids, section.max_bad_batches, device),
            SpeedMeter(
                model.num_parameters(exclude_embeddings=True), self.plan.processes, peak, device
            ),
        )

    def resume_point(self, trainer: Any) -> Checkpoint | None:
        """The checkpoint to go on from; metrics and checkpoints that go beyond it are removed.

        Raises:
            ConfigError: other processes wrote the checkpoints, and these cannot go on from them.
            TryAgainError: the checkpoints cannot be read now.
        """

        def decide() -> Checkpoint | None:
            found, refused = checkpoints.newest_whole(self.run.checkpoints(self.stage))
            for why in refused:
                self.console.warn("checkpoint_refused", f"{self.stage}: {why}")
            if found is None and refused:
                self._say_anew("no checkpoint is whole")
            elif found is not None and not continues(
                self.run, self.stage, found.plan, self.plan, self.console
            ):
                self._say_anew(f"the checkpoints are of {difference(found.plan, self.plan)}")
                found = None
            self._clear_beyond(found)
            return found

        return self._by_the_first(trainer, decide)

    def _by_the_first(self, trainer: Any, decide: Callable[[], _T]) -> _T:
        """What the first process decides by looking at files, or its error, in all processes.

        On a shared file system two of them may see different things at the same moment.
        """
        said: list[Any] = [None]
        if trainer.accelerator.is_main_process:
            try:
                said = [(decide(), None)]
            except MedtrainError as error:
                said = [(None, (error.exit_code, error.message, error.fix))]
        decided, refused = broadcast_object_list(said)[0]
        if refused is not None:
            raise from_exit_code(*refused)
        return cast("_T", decided)

    def train(self, trainer: Any, before: Mapping[str, torch.Tensor] | None) -> dict[str, Any]:
        """Train to the end and publish the adapter; returns figures for the receipt.

        Args:
            trainer: one of medtrain.train.trainers.
            before: the adapter that training started from; None for a fresh one, whose B is 0.

        Raises:
            ConfigError: the GPU's memory is too small, or the checkpoints do not fit.
            StoppedError: training was asked to stop, and has saved.
            MedtrainError: the loss is no number, or the adapter has not changed.
        """
        start = self.resume_point(trainer)
        if start is None or not start.finished:
            self._run_trainer(trainer, start)

        def end() -> tuple[Checkpoint, Checkpoint]:
            directory = self.run.checkpoints(self.stage)
            last, _ = checkpoints.newest_whole(directory)
            if last is None or not last.finished:
                raise MedtrainError(
                    f"{self.stage} ended without a whole checkpoint of its end in {directory}",
                    fix="Run the same command: it goes on from the last whole one.",
                )
            chosen = self._choose(directory, last)
            self._check_changed(chosen, before)
            checkpoints.publish_adapter(self.run, self.stage, chosen, self._facts())
            return last, chosen

        last, chosen = self._by_the_first(trainer, end)
        trainer.accelerator.end_training()
        return self._figures(trainer, last, chosen)

    def _choose(self, directory: Path, last: Checkpoint) -> Checkpoint:
        best = checkpoints.best_step(last.history)
        if best is None or best == last.step or not getattr(self.config, self.stage).keep_best:
            return last
        chosen = checkpoints.at_step(directory, best)
        if why := checkpoints.why_not_whole(chosen.path):
            raise DataError(
                f"The best checkpoint, {chosen.path}, is damaged: {why}",
                fix=f"Set {self.stage}.keep_best=false to take the last one, or train again: "
                f"--force {self.stage}.",
            )
        return chosen

    def _run_trainer(self, trainer: Any, start: Checkpoint | None) -> None:
        section = getattr(self.config, self.stage)
        metrics = self.run.metrics(self.stage) if trainer.args.should_save else None
        with self.console.progress(self.stage, self.plan.max_steps, "steps") as progress:
            trainer.add_callback(
                Telemetry(
                    metrics,
                    progress,
                    early_stopping=section.early_stopping,
                    checkpoint_steps=section.checkpoint_steps,
                )
            )
            trainer.add_callback(GoingOn(trainer, start))
            try:
                trainer.train(resume_from_checkpoint=str(start.path) if start else None)
            except NothingLeftError:
                return
            except EvaluationStoppedError:
                trainer.stopped = True
            except torch.OutOfMemoryError as error:
                raise out_of_memory(error, self.config, self.stage) from error
            except RuntimeError as error:
                if self.plan.processes > 1 and _lost_a_process(error):
                    raise TryAgainError(
                        f"{self.stage} has lost one of its {self.plan.processes} processes",
                        fix="Run the same command: it goes on from the last whole checkpoint.",
                    ) from error
                raise
        if trainer.stopped:
            trainer.accelerator.end_training()
            step = trainer.state.global_step
            raise StoppedError(
                f"{self.stage} was asked to stop and has, at step {step} of {self.plan.max_steps}",
                fix="Run the same command: it goes on from there.",
            )

    def _say_anew(self, why: str) -> None:
        self.console.warn(
            "checkpoints_ignored",
            f"{self.stage}: {why}, so training begins anew; they lie in superseded/",
        )

    def _clear_beyond(self, start: Checkpoint | None) -> None:
        directory, metrics = self.run.checkpoints(self.stage), self.run.metrics(self.stage)
        if start is None:
            checkpoints.put_aside(directory, self.run.root / "superseded" / self.stage)
            metrics.unlink(missing_ok=True)
            return
        checkpoints.prune_beyond(directory, start.step)
        keep_metrics_until(metrics, start.step)
        self.console.event(
            "resume",
            f"{self.stage}: going on from step {start.step} of {self.plan.max_steps}",
            stage=self.stage,
            step=start.step,
            of=self.plan.max_steps,
        )

    def _check_changed(self, chosen: Checkpoint, before: Mapping[str, torch.Tensor] | None) -> None:
        after = read_weights(chosen.path)
        if before is None:
            changed = any(bool(w.any()) for name, w in after.items() if "lora_B" in name)
        else:
            changed = any(not torch.equal(w, before[name].to(w)) for name, w in after.items())
        if not changed:
            raise MedtrainError(
                f"{self.stage} left the adapter as it was",
                fix=f"Raise {self.stage}.learning_rate or {self.stage}.epochs; with "
                f"{self.plan.max_steps} steps, check {self.stage}.warmup_ratio too.",
            )

    def _facts(self) -> AdapterFacts:
        model = self.config.model
        return AdapterFacts(
            base=model.base,
            revision=model.revision,
            vocab_rows=self.chat.vocab_rows,
            new_token_ids=list(self.chat.new_token_ids),
            stage=self.stage,
        )

    def _figures(self, trainer: Any, last: Checkpoint, chosen: Checkpoint) -> dict[str, Any]:
        trained = [line["loss"] for line in last.history if "loss" in line]
        evaluated = {line["step"]: line for line in last.history if "eval_loss" in line}
        figures: dict[str, Any] = {
            "steps": last.step,
            "kept_step": chosen.step,
            "trainable_parameters": sum(
                p.numel() for p in trainer.model.parameters() if p.requires_grad
            ),
            "train_loss": round(trained[-1], 4) if trained else None,
        }
        if chosen.step in evaluated:
            figures["validation_loss"] = round(evaluated[chosen.step]["eval_loss"], 4)
        return figures


def _lost_a_process(error: RuntimeError) -> bool:
    """Whether a collective failed because another process had ended."""
    return isinstance(error, torch.distributed.DistError) or any(
        word in str(error) for word in _LOST
    )
