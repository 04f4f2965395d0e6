"""From `sft:` and `dpo:` to the arguments of TRL's SFTConfig, DPOConfig and KTOConfig.

our section + number of rows + device → one dictionary that all share, then each one's own fields,
then `trainer:` as it is → the TRL config, with its complaints as ConfigError.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from transformers.training_args import OptimizerNames
from trl import DPOConfig as TrlDPOConfig
from trl import KTOConfig as TrlKTOConfig
from trl import SFTConfig as TrlSFTConfig

from medtrain.beforehand import check_packages
from medtrain.config import RunConfig, TrainingConfig
from medtrain.config.problems import nearest
from medtrain.config.training import Strategy
from medtrain.console import Console
from medtrain.environment import STRATEGY_VARIABLE
from medtrain.errors import ConfigError
from medtrain.memory import Choice, architecture_of, choose_under
from medtrain.memory.work import optimizer_under
from medtrain.run import Run, Trained
from medtrain.train.checkpoints import Plan
from medtrain.train.liger import uses_liger
from medtrain.train.model import compute_dtype
from medtrain.train.preemption import any_process


def make_plan(section: TrainingConfig, train_rows: int, strategy: str) -> Plan:
    """How many optimiser steps the rows make, by how many processes."""
    processes = world_size()
    rows_a_step = section.batch_size * section.gradient_accumulation * processes
    steps_per_epoch = max(1, math.ceil(train_rows / rows_a_step))
    max_steps = section.max_steps or math.ceil(section.epochs * steps_per_epoch)
    return Plan(max_steps, steps_per_epoch, rows_a_step, processes, strategy)


def world_size() -> int:
    """Processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def strategy_here() -> str:
    """The strategy that the launcher set for this process, or plain data parallelism."""
    return os.environ.get(STRATEGY_VARIABLE, "ddp")


class Fields(NamedTuple):
    """What of TRL's configuration one way to train has of its own."""

    config: Callable[..., Any]
    own: Callable[[Any], dict[str, Any]]
    """Makes fields of the stage's section."""


SUPERVISED = Fields(
    TrlSFTConfig,
    lambda section: {
        "max_length": section.max_length,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    },
)
PAIRED = Fields(
    TrlDPOConfig,
    lambda section: {
        "max_length": section.max_length,
        "beta": section.beta,
        "loss_type": [section.loss_type],
        "label_smoothing": section.label_smoothing,
    },
)
UNPAIRED = Fields(
    TrlKTOConfig,
    lambda section: {
        "max_length": section.max_length,
        "beta": section.beta,
        "desirable_weight": section.desirable_weight,
        "undesirable_weight": section.undesirable_weight,
        # In examples, two of each pair: TRL refuses a batch of one, which has no mismatched pair.
        "per_device_train_batch_size": 2 * section.batch_size,
    },
)


def trainer_settings(
    fields: Fields,
    run: Run,
    config: RunConfig,
    stage: Trained,
    plan: Plan,
    *,
    validated: bool,
    console: Console,
) -> Any:
    """TRL's configuration for rows that are token ids already.

    Args:
        fields: the way to train.
        run: where logs and checkpoints go.
        config: the run's.
        stage: whose section says how.
        plan: how many steps, by how many processes.
        validated: whether there are validation rows.
        console: what is left off is warned of there.

    Raises:
        ConfigError: TRL refuses a value, or would ignore one.
    """
    section = getattr(config, stage)
    arguments = _shared(run, config, stage, plan, validated, console)
    return _checked(fields.config, {**arguments, **fields.own(section), **section.trainer}, stage)


def _shared(
    run: Run, config: RunConfig, stage: Trained, plan: Plan, validated: bool, console: Console
) -> dict[str, Any]:
    section: TrainingConfig = getattr(config, stage)
    on_gpu = torch.cuda.is_available()
    dtype = compute_dtype(config)
    evaluated = _steps_between_evaluations(section, plan)
    # DeepSpeed on a machine without GPUs: accelerate takes the device from its environment.
    use_cpu = not on_gpu and "ACCELERATE_TORCH_DEVICE" not in os.environ
    if section.early_stopping and not validated:
        console.warn(
            "early_stopping_off",
            f"{stage}: none of so few rows is set aside for validation, so training cannot stop "
            f"early; raise {stage}.validation_fraction",
            stage=stage,
        )
    return {
        "output_dir": str(run.checkpoints(stage)),
        "seed": config.seed,
        "data_seed": config.seed,
        "max_steps": plan.max_steps,
        "learning_rate": section.learning_rate,
        "per_device_train_batch_size": section.batch_size,
        "per_device_eval_batch_size": section.eval_batch_size,
        # A batch of the loader is a whole step (medtrain.train.step).
        "gradient_accumulation_steps": 1,
        "lr_scheduler_type": section.scheduler,
        "warmup_steps": math.ceil(section.warmup_ratio * plan.max_steps),
        "weight_decay": section.weight_decay,
        "max_grad_norm": section.max_grad_norm,
        "optim": choose_optimizer(run, config, stage, plan, console),
        "gradient_checkpointing": checkpoints_activations(run, config, stage, plan),
        "use_cpu": use_cpu,
        # DeepSpeed would round the adapter itself to it; there the loss is computed in it
        # (medtrain.train.step).
        "bf16": dtype == torch.bfloat16 and not plan.strategy.startswith("zero"),
        "fp16": dtype == torch.float16,
        "logging_steps": section.log_every,
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps" if validated else "no",
        "eval_steps": evaluated,
        "save_strategy": "steps",
        "save_steps": evaluated,
        "save_only_model": False,
        "remove_unused_columns": False,
        "dataloader_pin_memory": on_gpu,
        "ddp_find_unused_parameters": False,
        "ddp_broadcast_buffers": False,
        "ddp_backend": "gloo" if not on_gpu and "RANK" in os.environ else None,
        "use_liger_kernel": uses_liger(config),
        "torch_compile": config.train.compile is True,
        "log_level": "error",
        "log_level_replica": "error",
        "disable_tqdm": True,
        "report_to": _trackers(run, config, stage),
        "run_name": f"{config.name}-{stage}",
    }


def _trackers(run: Run, config: RunConfig, stage: Trained) -> list[str] | str:
    """The trackers that metrics go to, as transformers takes them."""
    check_packages(config)
    if "tensorboard" in config.train.trackers:
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(run.logs / "tensorboard" / stage))
    return list(config.train.trackers) or "none"


def checkpoints_activations(run: Run, config: RunConfig, stage: Trained, plan: Plan) -> bool:
    """Whether activations are computed again in the backward pass: as told, or where they must.

    On a GPU whose base nobody can look up they are: a slower training is better than none.
    """
    wanted = getattr(config, stage).activation_checkpointing
    if wanted != "auto" or not torch.cuda.is_available():
        return wanted is True
    return _choice(run, config, stage, plan).checkpointing


def _choice(run: Run, config: RunConfig, stage: Trained, plan: Plan) -> Choice:
    """What the memory of this GPU leaves to choose."""
    built = run.built_base if config.model.base.startswith("builtin:") else None
    return choose_under(
        config,
        stage,
        cast("Strategy", plan.strategy),
        gpus=plan.processes,
        gpu_bytes=torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory,
        architecture=architecture_of(config, built),
        auto_bytes=2 if torch.cuda.is_bf16_supported(including_emulation=False) else 4,
    )


def _steps_between_evaluations(section: TrainingConfig, plan: Plan) -> int:
    if section.evals_per_epoch == 0:
        return plan.max_steps
    return max(1, min(round(plan.steps_per_epoch / section.evals_per_epoch), plan.max_steps))


def choose_optimizer(
    run: Run, config: RunConfig, stage: Trained, plan: Plan, console: Console
) -> str:
    """The optimiser of transformers that `optimizer` stands for on this machine.

    Raises:
        ConfigError: there is none of that name.
    """
    name: str = getattr(config, stage).optimizer
    if name == "auto":
        return _best_optimizer(run, config, stage, plan)
    on_gpu, sharded = torch.cuda.is_available(), plan.strategy == "fsdp2"
    known = [member.value for member in OptimizerNames]
    if name not in known:
        raise ConfigError(
            f"{stage}.optimizer: there is no {name!r}.{nearest(name, known)}",
            fix=f"Valid: auto, {', '.join(known)}",
        )
    if (sharded or not on_gpu) and any(mark in name for mark in ("bnb", "bit", "paged")):
        why = "knows no weights that FSDP2 shards" if sharded else "needs a GPU"
        console.warn(
            "optimizer_replaced",
            f"{stage}.optimizer {name} {why}: adamw_torch takes its place",
            wanted=name,
            used="adamw_torch",
        )
        return "adamw_torch"
    return name


def _best_optimizer(run: Run, config: RunConfig, stage: Trained, plan: Plan) -> str:
    """What `auto` takes: fused where the moments fit beside the rest."""
    if not torch.cuda.is_available():
        return "adamw_torch"
    return optimizer_under(plan.strategy, _choice(run, config, stage, plan).optimizer)


def _checked(kind: Any, arguments: dict[str, Any], stage: Trained) -> Any:
    try:
        settings = kind(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"TRL's {kind.__name__} refuses the settings of {stage}: {str(error).splitlines()[0]}",
            fix=f"Look at {stage}.trainer, whose fields are passed on as they are.",
        ) from error
    # Processes that checkpoint differently gather weights differently, and wait for ever.
    agreed = any_process(bool(settings.gradient_checkpointing), settings.device)
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        if hasattr(settings, name):
            setattr(settings, name, agreed)
    if settings.n_gpu > 1:
        # transformers would wrap the model in nn.DataParallel; here a process has one GPU.
        settings._n_gpu = 1
    return settings
