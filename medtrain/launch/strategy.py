"""Which strategy a training stage is launched with, and why; what is known not to work is refused.

train.accelerate_config or train.strategy, or for `auto` the cheapest that the memory estimate says
will fit → refused with the reason, before anything starts, or a choice that is said.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from medtrain.config import RunConfig
from medtrain.config.lora_path import why_not_fused
from medtrain.config.training import Strategy
from medtrain.errors import ConfigError
from medtrain.launch import devices
from medtrain.launch.strategy_files import strategy_file, strategy_of_file
from medtrain.run import Trained

DEEPSPEED = ("zero2", "zero3", "zero3-offload")


class Chosen(NamedTuple):
    """A strategy, and why it was taken."""

    strategy: Strategy
    reason: str
    fits: bool = True
    """Whether the estimate says that there is memory enough; without an estimate, true."""


def choose(config: RunConfig, stage: Trained, *, gpus: int) -> Chosen:
    """The strategy for a training stage, if it can work.

    Args:
        config: the run's.
        stage: that is to be trained.
        gpus: of all nodes together; 0 on CPUs.

    Raises:
        ConfigError: it is known not to work here.
        BadNodeError: the GPUs' memory cannot be read.
    """
    chosen = asked_for(config) or _cheapest(config, stage, gpus)
    refuse(chosen.strategy, config, on_gpu=gpus > 0)
    return chosen


def config_file(config: RunConfig, strategy: Strategy) -> Path:
    """The accelerate configuration to launch with: the user's, or the strategy's."""
    given = config.train.accelerate_config
    return strategy_of_file(given)[0] if given else strategy_file(strategy)


def asked_for(config: RunConfig) -> Chosen | None:
    """What the configuration names; None leaves it to medtrain.

    Raises:
        ConfigError: it names two that differ, or a file that is none.
    """
    wanted, file = config.train.strategy, config.train.accelerate_config
    if file is None:
        return None if wanted == "auto" else Chosen(wanted, "train.strategy")
    path, found = strategy_of_file(file)
    if wanted not in ("auto", found):
        raise ConfigError(
            f"train.strategy is {wanted}, but train.accelerate_config {path} is {found}",
            fix="Set one of the two.",
        )
    return Chosen(found, f"train.accelerate_config {path}")


def _cheapest(config: RunConfig, stage: Trained, gpus: int) -> Chosen:
    if gpus == 0:
        return Chosen("ddp", "on CPUs nothing is sharded unless train.strategy says so")
    from medtrain.memory import architecture_of, choose_strategy

    gpu = devices.look_at_gpus()
    choice = choose_strategy(
        config,
        stage,
        gpus=gpus,
        gpu_bytes=gpu.bytes,
        architecture=architecture_of(config),
        auto_bytes=2 if gpu.has_bfloat16 else 4,
    )
    return Chosen(choice.strategy, choice.reason, choice.fits)


def refuse(strategy: str, config: RunConfig, *, on_gpu: bool) -> None:
    """Refuse what is known not to work.

    Raises:
        ConfigError: with the reason.
    """
    if not on_gpu:
        _refuse_on_cpu(strategy, config)
    why_not_fused(config, strategy)
    if strategy in DEEPSPEED and find_spec("deepspeed") is None:
        raise ConfigError(
            f"train.strategy {strategy} needs DeepSpeed, which is not installed here",
            fix="pip install 'deepspeed>=0.19', or set train.strategy=ddp.",
        )


def _refuse_on_cpu(strategy: str, config: RunConfig) -> None:
    if strategy == "fsdp2":
        raise ConfigError(
            "train.strategy fsdp2 needs GPUs: on a CPU accelerate does not recognise it, and would "
            "train a model of its own in each process without a word",
            fix="Set train.strategy=zero3, which works on CPUs, or ddp.",
        )
    if strategy == "zero3-offload":
        raise ConfigError(
            "train.strategy zero3-offload moves weights from GPUs to main memory; without a GPU "
            "they are there already",
            fix="Set train.strategy=zero3.",
        )
    if strategy in DEEPSPEED and config.model.dtype == "float16":
        raise ConfigError(
            f"train.strategy {strategy} with model.dtype float16 needs a GPU: DeepSpeed has no "
            "float16 on a CPU",
            fix="Set model.dtype=float32 or bfloat16.",
        )
