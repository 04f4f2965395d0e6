"""`sft:`, `dpo:` and `train:` how the adapter is trained, and on which devices in which way."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from medtrain.config.base import Section
from medtrain.config.model import LoraConfig


class TrainingConfig(Section):
    """What SFT and DPO share."""

    epochs: float = Field(1.0, gt=0)
    """Passes over the training rows."""
    max_steps: int | None = Field(None, ge=1)
    """Optimiser steps; overrides `epochs`."""
    learning_rate: float = Field(2e-4, gt=0)
    """Peak learning rate."""
    batch_size: int = Field(4, ge=1)
    """Rows a device and forward pass."""
    gradient_accumulation: int = Field(1, ge=1)
    """Forward passes an optimiser step."""
    eval_batch_size: int = Field(8, ge=1)
    """Rows a device and forward pass of an evaluation."""
    scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    """Learning rate schedule."""
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    """Share of the steps over which the learning rate rises."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = Field(0.3, gt=0)
    """Gradients are clipped to this norm."""
    optimizer: str = "auto"
    """An optimiser name of transformers; `auto`: on a GPU adamw_torch_fused, or paged_adamw_8bit
    where only that fits beside an NF4 base; adamw_torch on a CPU and where weights are sharded. A
    bitsandbytes optimiser on a CPU falls back to adamw_torch, and says so."""
    max_length: int = Field(1024, ge=8)
    """Longest row, prompt and answer together, in tokens."""
    packing: bool | Literal["auto"] = "auto"
    """Compute the rows of a step side by side without padding, each attending to itself alone. It
    changes speed and memory, not what is learnt: a step has the same rows. A forward pass takes at
    most `batch_size` times `max_length` tokens. `auto`: where the model's attention allows it."""
    activation_checkpointing: bool | Literal["auto"] = "auto"
    """Trade compute for memory; `auto`: where the estimate says that it does not fit otherwise."""
    log_every: int = Field(10, ge=1)
    """Optimiser steps between two lines of metrics."""
    evals_per_epoch: float = Field(2.0, ge=0)
    """Evaluations (and checkpoints) an epoch; 0 for one at the end only."""
    checkpoint_steps: int | None = Field(None, ge=1)
    """Optimiser steps between checkpoints, beside those at evaluations: what a lost node may
    cost."""
    max_bad_batches: int = Field(3, ge=0)
    """Forward passes whose loss is no number, or has exploded, before training stops and names
    their rows; the former are left out of their step. A GPU is not waited for after each pass:
    there the whole step is left out and counts as one."""
    early_stopping: int = Field(0, ge=0)
    """Stop after this many evaluations without a better loss; 0 for never."""
    validation_fraction: float = Field(0.05, ge=0, lt=0.5)
    """Share of the training rows on which the loss is evaluated; the evaluation split stays
    untouched until the end."""
    keep_best: bool = True
    """End with the checkpoint of the lowest evaluation loss, not with the last."""
    trainer: dict[str, Any] = Field(default_factory=dict)
    """More fields of TRL's SFTConfig, or for preferences DPOConfig or KTOConfig, passed on as they
    are."""

    @model_validator(mode="after")
    def _early_stopping_needs_validation(self) -> TrainingConfig:
        if self.early_stopping and not self.validation_fraction:
            raise ValueError("early_stopping needs validation rows, but validation_fraction is 0")
        return self


class SFTConfig(TrainingConfig):
    """Supervised fine-tuning."""

    lora: LoraConfig = LoraConfig()
    """The adapter."""
    loss_on: Literal["assistant", "all"] = "assistant"
    """Which tokens carry loss."""


class DPOConfig(TrainingConfig):
    """Learning from preferences; going on from the SFT adapter, whose answers were compared."""

    learning_rate: float = Field(5e-5, gt=0)
    """Peak learning rate."""
    batch_size: int = Field(2, ge=1)
    """Pairs a device and forward pass."""
    gradient_accumulation: int = Field(2, ge=1)
    """Forward passes an optimiser step."""
    beta: float = Field(0.1, gt=0)
    """`dpo` and `kto`: how strongly the trained model is held to the reference (with `loss_type:
    ipo` it is the paper's τ). `orpo`: weight of the odds ratio against the fine-tuning loss, the
    paper's λ. `rejection` has none."""
    method: Literal["dpo", "orpo", "kto", "rejection"] = "dpo"
    """What this stage trains with. `dpo` (https://arxiv.org/abs/2305.18290) compares both answers
    with what the SFT model made of them. `kto` (https://arxiv.org/abs/2402.01306) does so with each
    answer by itself. `orpo` (https://arxiv.org/abs/2403.07691) fine-tunes on the chosen answers and
    raises their odds, without a reference. `rejection` (https://arxiv.org/abs/2304.06767)
    fine-tunes on the best answer of each prompt. Whichever it is, the variant is called `dpo`."""
    loss_type: Literal[
        "sigmoid",
        "hinge",
        "ipo",
        "robust",
        "nca_pair",
        "bco_pair",
        "sppo_hard",
        "apo_zero",
        "apo_down",
        "discopop",
        "sigmoid_norm",
    ] = "sigmoid"
    """The preference loss of `method: dpo`, by TRL's names."""
    desirable_weight: float = Field(1.0, gt=0)
    """With `method: kto`, weight of the losses of chosen answers."""
    undesirable_weight: float = Field(1.0, gt=0)
    """With `method: kto`, weight of the losses of rejected answers, of which there are as many as
    of chosen ones."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of preferences taken to be the wrong way round; with `loss_type: robust`."""
    validation_fraction: float = Field(0.1, ge=0, lt=0.5)
    """Share of the pairs on which the loss is evaluated."""
    reference_shards: int = Field(1, ge=1)
    """Pieces in which the reference's log-probabilities are computed before training: the tasks of
    an array, each with one GPU. It changes no result."""

    @property
    def needs_reference(self) -> bool:
        """Whether the method compares the trained model with the one it started as."""
        return self.method in ("dpo", "kto")

    @property
    def unread(self) -> frozenset[str]:
        """Settings that the method has no use for."""
        return frozenset(name for name, methods in _READ_BY.items() if self.method not in methods)

    @model_validator(mode="after")
    def _settings_fit_the_method(self) -> DPOConfig:
        """A setting without an effect would give a wrong impression of what was done."""
        fields = type(self).model_fields
        wrong = [
            f"{name} is used by method: {' or '.join(_READ_BY[name])} only, and method is "
            f"{self.method}"
            for name in sorted(self.unread)
            if getattr(self, name) != fields[name].default
        ]
        if not wrong and self.label_smoothing and self.loss_type != "robust":
            wrong = ["label_smoothing is used by loss_type: robust only"]
        if wrong:
            raise ValueError(
                "; ".join([*wrong, "leave them out" if len(wrong) > 1 else "leave it out"])
            )
        return self


_READ_BY = {
    "beta": ("dpo", "orpo", "kto"),
    "loss_type": ("dpo",),
    "label_smoothing": ("dpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
}
"""Settings of some methods, and which these are."""

Strategy = Literal["ddp", "zero2", "zero3", "zero3-offload", "fsdp2"]
"""How weights, gradients and state lie on several devices; configs/accelerate/ has each."""


class TrainConfig(Section):
    """Where and in which way a training stage runs when medtrain starts it."""

    strategy: Strategy | Literal["auto"] = "auto"
    """`auto`: the cheapest that fits the GPUs, replicated weights before sharded ones."""
    processes: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """On each node. `auto`: one for every GPU in sight, or one on a CPU."""
    accelerate_config: str | None = None
    """A YAML file for `accelerate launch --config_file` in place of the strategy's."""
    liger: bool | Literal["auto"] = "auto"
    """Liger's fused layer kernels; `auto`: on an NVIDIA GPU where `liger-kernel` is installed."""
    fused_lora: bool | Literal["auto"] = "auto"
    """Compute an adapter together with its base layer, and layers that read the same input together
    (queries, keys and values; an MLP's first two), their dropout's mask included. The results are
    PEFT's but for rounding and the drawn masks. `auto`: wherever it fits, which is not under
    `zero3` and `fsdp2`, with `sft.lora.dora` or with `compile`; true refuses a run where it does
    not."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile; `auto`: off, since quantised layers and changing lengths recompile."""
    trackers: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = Field(
        default_factory=list
    )
    """Where metrics go besides `logs/<stage>.metrics.jsonl`."""
