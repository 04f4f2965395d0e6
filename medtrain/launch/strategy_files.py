"""The accelerate configurations: where ours lie, and which strategy any of them stands for."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from medtrain.config.training import Strategy
from medtrain.errors import ConfigError, MedtrainError

_REPLICATED = ("NO", "MULTI_GPU", "MULTI_CPU")


def strategy_file(strategy: Strategy) -> Path:
    """configs/accelerate/<strategy>.yaml, of a checkout or as it was installed.

    Raises:
        MedtrainError: it is in neither place.
    """
    checkout = Path(__file__).parents[2] / "configs" / "accelerate" / f"{strategy}.yaml"
    installed = Path(sys.prefix, "share", "medtrain", "configs", "accelerate", checkout.name)
    for path in (checkout, installed):
        if path.is_file():
            return path
    raise MedtrainError(
        f"configs/accelerate/{strategy}.yaml is neither at {checkout} nor at {installed}",
        fix="Install medtrain again.",
    )


def strategy_of_file(accelerate_config: str) -> tuple[Path, Strategy]:
    """An accelerate configuration of the user's, and the strategy that it stands for.

    Raises:
        ConfigError: there is no such file, or accelerate could not read it, or medtrain cannot
            train in that way.
    """
    path = Path(accelerate_config).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"train.accelerate_config: there is no file {path}",
            fix="Give a file that `accelerate config` wrote, or leave it out.",
        )
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        kind = str(tree["distributed_type"])
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"train.accelerate_config: {path} is no configuration of accelerate",
            fix="`accelerate config --config_file FILE` writes one.",
        ) from error
    section = {"FSDP": "fsdp_config", "DEEPSPEED": "deepspeed_config"}.get(kind, "")
    return path, strategy_named(kind, tree.get(section) or {})


def strategy_named(kind: str, fields: Mapping[str, Any]) -> Strategy:
    """The strategy that accelerate's distributed type and its fields stand for.

    Raises:
        ConfigError: medtrain cannot train in that way.
    """
    if kind in _REPLICATED:
        return "ddp"
    if kind == "FSDP":
        if str(fields.get("fsdp_version", "1")) != "2":
            raise ConfigError(
                "FSDP's first version wants one dtype for the base and the adapters, which are "
                "float32 here",
                fix="Set fsdp_version: 2, or take train.strategy=zero3.",
            )
        return "fsdp2"
    if kind == "DEEPSPEED":
        return _zero(fields)
    raise ConfigError(
        f"accelerate's distributed_type {kind} is not one that medtrain trains with",
        fix=f"Valid: {', '.join(_REPLICATED)}, DEEPSPEED, FSDP.",
    )


def _zero(fields: Mapping[str, Any]) -> Strategy:
    stage, device = fields.get("zero_stage"), fields.get("offload_param_device")
    file = fields.get("deepspeed_config_file")
    if file:
        try:
            zero = json.loads(Path(file).read_text(encoding="utf-8"))["zero_optimization"]
            stage, device = zero["stage"], (zero.get("offload_param") or {}).get("device")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"deepspeed_config_file: {file} says no zero_optimization.stage",
                fix="A path in it starts at the working directory.",
            ) from error
    # Accelerate's own default is stage 2.
    if str(stage if stage is not None else 2) != "3":
        return "zero2"
    return "zero3-offload" if device not in (None, "none") else "zero3"
