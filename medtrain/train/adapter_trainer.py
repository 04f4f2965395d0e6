"""TRL's trainers, changed where a run must end with the same bytes however often it was killed.

- A checkpoint holds the adapter `default` alone, in float32; the trainer's sums since the last line
  of metrics; and a manifest, once it is whole.
- A line of metrics has the figures of the passes since the one before it, and the speed.
- Told to stop, a training saves first.
"""

from __future__ import annotations

import errno
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from medtrain.errors import TryAgainError
from medtrain.train import checkpoints, fsdp
from medtrain.train.adapter import (
    adapter_shapes,
    load_weights,
    read_weights,
    trainable_parameters,
    write_adapter,
)
from medtrain.train.checkpoints import Plan
from medtrain.train.evaluating import EvaluationStoppedError
from medtrain.train.sharded import fit_buckets, keep_token_layers_whole
from medtrain.train.step import StepTrainer
from medtrain.train.telemetry import tokens_seen

_LITTLE_SPACE = 64 * 2**20
STAGE3 = 3
"""Of ZeRO, the one that shards weights."""


class AdapterTrainer(StepTrainer):
    """What all trainers change in how checkpoints are written and read, and in how they stop."""

    plan: Plan
    is_fsdp_enabled: bool
    _metrics: dict[str, Any]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No: the report room writes the model card."""

    # Writing

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter; where it lies whole in every process, nothing is gathered for it."""
        if self._is_deepspeed and self._zero_stage < STAGE3:
            self._save(output_dir)
        elif self.is_fsdp_enabled:
            self._save(output_dir, fsdp.whole_weights(self.model))
        else:
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            directory = Path(output_dir or self.args.output_dir)
            write_adapter(self.model, directory, state_dict=state_dict)

    def _save_checkpoint(self, model: Any, trial: Any, *, evaluated: bool = True) -> None:
        directory = Path(self.args.output_dir)
        path = directory / f"checkpoint-{self.state.global_step}"
        with _full_disk_said(directory):
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
            self._sums_file(path).write_text(json.dumps(self._sums()), encoding="utf-8")
        # Every process has written its random state before the checkpoint is called whole.
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            with _full_disk_said(directory):
                self._finish_checkpoint(path, evaluated)
        self.accelerator.wait_for_everyone()

    def _finish_checkpoint(self, path: Path, evaluated: bool) -> None:
        step = self.state.global_step
        trained = dict(trainable_parameters(self.model))
        checkpoints.check_adapter(
            path,
            adapter_shapes(self.model),
            dtype=next(iter(trained.values())).dtype,
            learnt=any(bool(_mine(p).any()) for name, p in trained.items() if "lora_B" in name),
        )
        ended = self.control.should_training_stop or step >= self.state.max_steps
        checkpoints.complete(
            path, step=step, finished=ended and evaluated, evaluated=evaluated, plan=self.plan
        )
        checkpoints.prune_to_best(path.parent, step, self.state.log_history)

    # Reading

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if self._is_deepspeed:
            fit_buckets(self.accelerator.state.deepspeed_plugin, self.model)
            if self._zero_stage == STAGE3:
                keep_token_layers_whole(self.model)
        if self.is_fsdp_enabled and (self.args.bf16 or self.args.fp16):
            dtype = torch.bfloat16 if self.args.bf16 else torch.float16
            fsdp.compute_in(self.accelerator.state.fsdp_plugin, dtype)
        return super()._prepare_for_training(*args, **kwargs)  # type: ignore[misc]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_weights(model or self.model, read_weights(Path(resume_from_checkpoint)))

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        trained = super()._init_training_state(*args, **kwargs)  # type: ignore[misc]
        # TRL's running count starts at 0 in every process; the log knows how far it had come.
        self._total_train_tokens = tokens_seen(self.state.log_history)
        return trained

    def _sums(self) -> dict[str, Any]:
        """What a line of metrics is going to be made of."""
        return {
            "loss": float(self._tr_loss),
            "since_step": self._globalstep_last_logged,
            "figures": self.figures["train"].sums(),
            "tokens": self._total_train_tokens,
            "guard": self.guard.sums(),
        }

    def restore_sums(self, path: Path) -> None:
        """Go on with the sums of a checkpoint, so that the next line is as if nothing had been."""
        sums = json.loads(self._sums_file(path).read_text(encoding="utf-8"))
        self._tr_loss = torch.tensor(sums["loss"], device=self.args.device)
        self._globalstep_last_logged = sums["since_step"]
        # One of an earlier version has other sums: its next line is about fewer steps.
        self.figures["train"].restore(sums.get("figures", {}))
        self._total_train_tokens = sums["tokens"]
        self.guard.restore(sums["guard"])

    def _sums_file(self, path: Path) -> Path:
        return path / f"sums_{self.args.process_index}.json"

    @property
    def _zero_stage(self) -> int:
        plugin = self.accelerator.state.deepspeed_plugin
        return int(plugin.zero_stage) if plugin is not None else 0

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """With the figures of the passes since the last line, and with the speed of training."""
        mode = "train" if self.model.training else "eval"
        means, tokens = self.figures[mode].line()
        if mode == "eval":  # which reads rows, but learns from none
            _, tokens = self.figures["train"].line()
            tokens += self._total_train_tokens
        else:
            tokens = self._total_train_tokens = self._total_train_tokens + tokens
        self.figures[mode].clear()
        if means:
            shown = {**means, "num_tokens": tokens}
            # TRL puts them into the line, as means of lists.
            self._metrics[mode].update({name: [value] for name, value in shown.items()})
        if "loss" in logs:
            logs.update(self.meter.line())
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    # Stopping

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers does; no thread is left behind."""
        try:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._stop_reading()

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """As transformers does; asked to stop, save first, and leave evaluations for later."""
        control = self.control
        waits = control.should_log or control.should_evaluate or control.should_save
        if self._learn_of_steps(all_of_them=waits) and not self.stopped:
            self.stopped = control.should_save = True
            self._learn_of_steps(all_of_them=True)
        began = time.perf_counter()
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)  # type: ignore[misc]
        except EvaluationStoppedError:
            self.stopped = True
            self.control.should_evaluate = self.control.should_save = False
            self.figures["eval"].clear()
            self.model.train()
            self._save_checkpoint(self.model_wrapped, None, evaluated=False)
        self.meter.paused(time.perf_counter() - began)
        if self.stopped:
            self.control.should_training_stop = True


def _mine(parameter: Any) -> torch.Tensor:
    """What lies of a weight in this process: all of it, unless the strategy shards it."""
    part: torch.Tensor = getattr(parameter, "ds_tensor", parameter)
    return part.to_local() if hasattr(part, "to_local") else part


@contextmanager
def _full_disk_said(directory: Path) -> Iterator[None]:
    """Whatever library meets a full disk first, and whatever it calls it: one clear message."""
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or shutil.disk_usage(directory).free < _LITTLE_SPACE:
            raise TryAgainError(
                f"The disk is full: a checkpoint could not be written to {directory}",
                fix="Free some space and run the same command: it goes on from the last whole "
                "checkpoint.",
            ) from error
        raise
