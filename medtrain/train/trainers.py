"""TRL's trainers, as medtrain.train.adapter_trainer changes them, each with its loss.

- TRL stores the trainable weights of a quantised model in bfloat16; here they keep their precision.
- DPO's reference is what the stage before it computed: no second adapter is held for it.
- Rows come as token ids; no trainer prepares, extends or cuts them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PrinterCallback
from trl import DPOTrainer, SFTTrainer

from medtrain.console import Console
from medtrain.errors import ConfigError, MedtrainError
from medtrain.run import Trained
from medtrain.train.adapter import (
    trainable_parameters,
)
from medtrain.train.adapter_trainer import STAGE3, AdapterTrainer
from medtrain.train.checkpoints import Plan
from medtrain.train.losses.computed import Computed, Ratio
from medtrain.train.losses.preference import FORMULAS, Pairs, Settings, preference
from medtrain.train.losses.supervised import supervised
from medtrain.train.packed import PackedForward, select_supervised
from medtrain.train.rounding import FAR, FirstLoss, first_loss, rounding_of_sums
from medtrain.train.rows import IGNORED
from medtrain.train.sharded import (
    let_trl_meet_merged_weights,
    still_whole,
)


class SupervisedTrainer(AdapterTrainer, SFTTrainer):  # type: ignore[misc]
    """SFT on rows of `input_ids` and `labels`."""

    def __init__(self, *, model: Any, plan: Plan, stage: Trained = "sft", **kwargs: Any) -> None:
        with weights_kept(model), refusals_said(stage):
            super().__init__(model=model, **kwargs)
        make_ready(self, plan)

    def computed(self, model: Any, inputs: Any, items: torch.Tensor | None) -> Computed:
        """The negative log-likelihood, or what TRL makes of settings that ask for more."""
        args = self.args
        more = (
            args.loss_type != "nll"
            or self.label_smoother is not None
            or self.aux_loss_enabled
            or not args.average_tokens_across_devices
        )
        if more:
            return computed_by_trl(self, SFTTrainer, model, inputs, items)
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        return supervised(outputs, inputs, items, self.accelerator.num_processes)


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

    def check_start(self, console: Console) -> None:
        """Compare policy and reference on a few rows: before a step they are one model.

        What is more than rounding explains is warned of; what is far more is an error.

        Raises:
            MedtrainError: they are two models.
        """
        first = range(min(self.args.per_device_eval_batch_size, len(self.fed.dataset)))
        inputs = self._prepare_inputs(self.fed.collate([self.fed.dataset[i] for i in first]))
        policy, reference = self._log_probabilities(inputs), self._reference(inputs)
        tokens = inputs["completion_mask"].sum(dim=1)
        layers = self.model.config.get_text_config().num_hidden_layers
        allowed = rounding_of_sums(policy, tokens, layers, self._computes_in)
        gaps = (policy - reference).abs()
        worst = int((gaps / allowed).argmax())
        gap, explained = float(gaps[worst]), float(allowed[worst])
        if not gap <= FAR * explained:
            raise MedtrainError(
                f"DPO would start with a margin: policy and reference differ by {gap:.3g} nats "
                f"on the first rows (rounding explains {explained:.3g})",
                fix="The reference belongs to another adapter, or the SFT adapter was not loaded "
                "whole: medtrain run CONFIG --force reference, or --force sft.",
            )
        loss = self._first_loss(inputs, policy - reference, allowed)
        if gap > explained or not (loss is None or loss.is_explained):
            self._warn_of_start(console, gap, explained, loss)

    def _warn_of_start(
        self, console: Console, gap: float, explained: float, loss: FirstLoss | None
    ) -> None:
        dtype = str(self._computes_in).removeprefix("torch.")
        said = "" if loss is None else (
            f", and the first loss is {loss.found:.4f} where one model has {loss.expected:.4f} "
            f"(± {loss.allowed:.2g})"
        )  # fmt: skip
        console.warn(
            "dpo_start",
            f"dpo: policy and reference differ by {gap:.3g} nats on the first rows, where {dtype} "
            f"explains {explained:.3g}{said}. The reference was computed on another kind of device "
            "or with other versions, or belongs to another adapter. Compute it again where DPO "
            "runs: --force reference",
            gap=gap,
            explained=explained,
        )

    @property
    def _computes_in(self) -> torch.dtype:
        if self.args.bf16 or self.args.fp16:
            return torch.bfloat16 if self.args.bf16 else torch.float16
        dtype: torch.dtype = self.fed.autocast or self.model.dtype
        return dtype

    def _first_loss(
        self, inputs: Any, gaps: torch.Tensor, allowed: torch.Tensor
    ) -> FirstLoss | None:
        """The loss that goes with the gaps between policy and reference, (answers,)."""
        return None

    @torch.no_grad()
    def _log_probabilities(self, inputs: Any) -> torch.Tensor:
        """Log probabilities of the answers under the policy, (answers,), without dropout."""
        was_training = self.model.training
        self.model.eval()
        with self.accelerator.autocast(), self.compute_loss_context_manager():
            outputs = answers_scored(PackedForward(self.model), inputs)
        self.model.train(was_training)
        sums: torch.Tensor = outputs.log_probs.float().sum(dim=1)
        return sums


class PreferenceTrainer(AnswerTrainer, DPOTrainer):  # type: ignore[misc]
    """DPO on rows of `prompt_ids`, `chosen_ids`, `rejected_ids` and the reference's sums."""

    @property
    def _asks_for_more(self) -> bool:
        """Whether settings of TRL's ask for more than our formulas have."""
        return (
            self.loss_types[0] not in FORMULAS
            or len(self.loss_types) > 1
            or self.loss_weights != [1.0]
            or self.f_divergence_type != "reverse_kl"
            or self.ld_alpha is not None
            or self.use_weighting
            or self.aux_loss_enabled
        )

    @property
    def _settings(self) -> Settings:
        return Settings(self.beta, self.label_smoothing, self.args.discopop_tau)

    def computed(self, model: Any, inputs: Any, items: torch.Tensor | None) -> Computed:
        """The loss that `dpo.loss_type` names, or what TRL makes of settings that ask for more."""
        if self._asks_for_more:
            return computed_by_trl(self, DPOTrainer, model, inputs, items)
        outputs = answers_scored(model, inputs)
        return preference(outputs, inputs, self.loss_types[0], self._settings)

    def _first_loss(
        self, inputs: Any, gaps: torch.Tensor, allowed: torch.Tensor
    ) -> FirstLoss | None:
        if self._asks_for_more:
            return None
        tokens = inputs["completion_mask"].sum(dim=1).chunk(2)

        def losses(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
            pairs = Pairs(chosen, rejected, *tokens)
            return FORMULAS[self.loss_types[0]](pairs, self._settings)

        return first_loss(losses, gaps.view(2, -1), allowed.view(2, -1))


def answers_scored(model: Any, inputs: Any) -> Any:
    """TRL's fused head at the tokens of answers: its outputs, (rows, length - 1) each."""
    known = ("input_ids", "attention_mask", "packed")
    return model(
        **{key: inputs[key] for key in known if key in inputs},
        labels=inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORED),
        use_cache=False,
        fused_lm_head=True,
    )


def computed_by_trl(
    trainer: Any, kind: Any, model: Any, inputs: Any, items: torch.Tensor | None
) -> Computed:
    """The loss of one of TRL's trainers, which reads its figures as it goes, and waits for them.

    Args:
        trainer: is a `kind`.
        kind: TRL's class.
        model: as its loss calls it.
        inputs: of the pass.
        items: tokens with a loss in the step.
    """
    mode = "train" if trainer.model.training else "eval"
    noted, before = trainer._metrics[mode], trainer._total_train_tokens
    loss = kind.compute_loss(trainer, model, inputs, num_items_in_batch=items)
    read = trainer._total_train_tokens - before
    figures = {name: Ratio(values[-1], 1.0) for name, values in noted.items()}
    figures.pop("num_tokens", None)
    # They are kept with the others, which forget those of a loss that is no number.
    noted.clear()
    trainer._total_train_tokens = before
    return Computed(loss, figures, read / trainer.accelerator.num_processes)


def make_ready(trainer: Any, plan: Plan) -> None:
    """What all trainers need once TRL's constructor is through."""
    trainer.plan = plan
    trainer.remove_callback(PrinterCallback)
    if trainer._is_deepspeed and trainer._zero_stage == STAGE3:
        let_trl_meet_merged_weights()
    select_supervised(trainer.model.get_base_model().base_model)


def drop_reference(model: Any) -> None:
    """Remove the frozen copy of the adapter that TRL makes to compute the reference live."""
    if "ref" in model.peft_config:
        model.delete_adapter("ref")
        model.set_adapter("default")


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
