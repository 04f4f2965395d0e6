"""TRL's trainers, changed where a run must end with the same bytes however often it was killed.

- A checkpoint holds the adapter `default` alone, in float32; the trainer's sums since the last line
  of metrics; and a manifest, once it is whole.
- TRL stores the trainable weights of a quantised model in bfloat16; here they keep their precision.
- DPO's reference is what the stage before it computed: no second adapter is held for it.
- Rows come as token ids; no trainer prepares, extends or cuts them.
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
from transformers import PrinterCallback
from trl import DPOTrainer, SFTTrainer

from medtrain.errors import ConfigError, MedtrainError, TryAgainError
from medtrain.run import Trained
from medtrain.train import checkpoints, fsdp
from medtrain.train.adapter import (
    adapter_shapes,
    load_weights,
    read_weights,
    trainable_parameters,
    write_adapter,
)
from medtrain.train.checkpoints import Plan
from medtrain.train.packed import PackedForward, select_supervised
from medtrain.train.sharded import (
    fit_buckets,
    keep_token_layers_whole,
    let_trl_meet_merged_weights,
    still_whole,
)
from medtrain.train.step import EvaluationStoppedError, StepTrainer
from medtrain.train.telemetry import tokens_seen

_LITTLE_SPACE = 64 * 2**20
_STAGE3 = 3


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
        if self._is_deepspeed and self._zero_stage < _STAGE3:
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
            if self._zero_stage == _STAGE3:
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
            "metrics": {name: list(values) for name, values in self._metrics["train"].items()},
            "tokens": self._total_train_tokens,
            "guard": self.guard.sums(),
        }

    def restore_sums(self, path: Path) -> None:
        """Go on with the sums of a checkpoint, so that the next line is as if nothing had been."""
        sums = json.loads(self._sums_file(path).read_text(encoding="utf-8"))
        self._tr_loss = torch.tensor(sums["loss"], device=self.args.device)
        self._globalstep_last_logged = sums["since_step"]
        self._metrics["train"].update(sums["metrics"])
        self._total_train_tokens = sums["tokens"]
        self.guard.restore(sums["guard"])

    def _sums_file(self, path: Path) -> Path:
        return path / f"sums_{self.args.process_index}.json"

    @property
    def _zero_stage(self) -> int:
        plugin = self.accelerator.state.deepspeed_plugin
        return int(plugin.zero_stage) if plugin is not None else 0

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """With the speed of training, where it is a line about training."""
        if "loss" in logs:
            logs.update(self.meter.line())
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    # Stopping

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """As transformers does; asked to stop, save first, and leave evaluations for later."""
        if not self.stopped and self.stop.agreed(self.args.device):
            self.stopped = self.control.should_save = True
        began = time.perf_counter()
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)  # type: ignore[misc]
        except EvaluationStoppedError:
            self.stopped = True
            self.control.should_evaluate = self.control.should_save = False
            self._metrics["eval"].clear()
            self.model.train()
            self._save_checkpoint(self.model_wrapped, None, evaluated=False)
        self.meter.paused(time.perf_counter() - began)
        if self.stopped:
            self.control.should_training_stop = True


class SupervisedTrainer(AdapterTrainer, SFTTrainer):  # type: ignore[misc]
    """SFT on rows of `input_ids` and `labels`."""

    def __init__(self, *, model: Any, plan: Plan, stage: Trained = "sft", **kwargs: Any) -> None:
        with weights_kept(model), refusals_said(stage):
            super().__init__(model=model, **kwargs)
        make_ready(self, plan)


class AnswerTrainer(AdapterTrainer):
    """What trainers of TRL share that take answers as token ids, with the reference's sums."""

    precompute_ref_logps: bool

    def __init__(self, *, model: Any, plan: Plan, **kwargs: Any) -> None:
        with weights_kept(model), refusals_said("dpo"), still_whole():
            super().__init__(model=model, **kwargs)  # type: ignore[call-arg]
        drop_reference(model)
        # Said afterwards: TRL's constructor would read every weight to name what it computes.
        self.precompute_ref_logps = True
        make_ready(self, plan)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def _reference(self, inputs: Any) -> torch.Tensor:
        """The reference's sums that came with the inputs, (answers,)."""
        return torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])

    def check_start(self) -> None:
        """Compare policy and reference on a few rows: before a step they are one model.

        Raises:
            MedtrainError: they differ by more than rounding.
        """
        first = range(min(self.args.per_device_eval_batch_size, len(self.fed.dataset)))
        inputs = self._prepare_inputs(self.fed.collate([self.fed.dataset[i] for i in first]))
        reference = self._reference(inputs)
        policy = self._log_probabilities(inputs)
        gap = float((policy - reference).abs().max())
        # Sums over hundreds of tokens: float32 keeps 7 digits of them, bfloat16 3.
        relative = 1e-5 if self.model.dtype == torch.float32 else 1e-2
        allowed = relative * max(1.0, float(policy.abs().max()))
        if not gap <= allowed:
            raise MedtrainError(
                f"DPO would start with a margin: policy and reference differ by {gap:.3g} nats "
                f"on the first rows (rounding explains {allowed:.3g})",
                fix="The reference belongs to another adapter, or the SFT adapter was not loaded "
                "whole: medtrain run CONFIG --force reference, or --force sft.",
            )

    @torch.no_grad()
    def _log_probabilities(self, inputs: Any) -> torch.Tensor:
        """Log probabilities of the answers under the policy, (answers,), without dropout."""
        was_training = self.model.training
        self.model.eval()
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        known = ("input_ids", "attention_mask", "packed")
        with self.accelerator.autocast(), self.compute_loss_context_manager():
            outputs = PackedForward(self.model)(
                **{key: inputs[key] for key in known if key in inputs},
                labels=labels, fused_lm_head=True, use_cache=False,
            )  # fmt: skip
        self.model.train(was_training)
        sums: torch.Tensor = outputs.log_probs.float().sum(dim=1)
        return sums


class PreferenceTrainer(AnswerTrainer, DPOTrainer):  # type: ignore[misc]
    """DPO on rows of `prompt_ids`, `chosen_ids`, `rejected_ids` and the reference's sums."""


def make_ready(trainer: Any, plan: Plan) -> None:
    """What all trainers need once TRL's constructor is through."""
    trainer.plan = plan
    trainer.remove_callback(PrinterCallback)
    if trainer._is_deepspeed and trainer._zero_stage == _STAGE3:
        let_trl_meet_merged_weights()
    select_supervised(trainer.model.get_base_model().base_model)


def drop_reference(model: Any) -> None:
    """Remove the frozen copy of the adapter that TRL makes to compute the reference live."""
    if "ref" in model.peft_config:
        model.delete_adapter("ref")
        model.set_adapter("default")


def _mine(parameter: Any) -> torch.Tensor:
    """What lies of a weight in this process: all of it, unless the strategy shards it."""
    part: torch.Tensor = getattr(parameter, "ds_tensor", parameter)
    return part.to_local() if hasattr(part, "to_local") else part


@contextmanager
def weights_kept(model: Any) -> Iterator[None]:
    """Undo the cast to bfloat16 that TRL gives the trainable weights of a quantised model."""
    before = {name: parameter.data for name, parameter in trainable_parameters(model)}
    if not before:
        raise MedtrainError(
            "The adapter has no trainable parameter",
            fix="Give sft.lora.targets the names of linear layers, or all-linear.",
        )
    yield
    for name, parameter in model.named_parameters():
        if name in before:
            parameter.data = before[name].to(parameter.device)


@contextmanager
def refusals_said(stage: Trained) -> Iterator[None]:
    """What TRL's trainer refuses when it is made are combinations of settings."""
    try:
        yield
    except (ImportError, NotImplementedError, ValueError) as error:
        raise ConfigError(
            f"TRL's trainer refuses the settings of {stage}: {str(error).splitlines()[0]}",
            fix=f"Look at {stage}.trainer, whose fields are passed on as they are.",
        ) from error


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
