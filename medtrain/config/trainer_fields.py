"""The fields that `sft.trainer:` and `dpo.trainer:` may hold, read from TRL's source.

Importing TRL takes seconds; its configuration classes are dataclasses, so names and types can be
read from the syntax tree in milliseconds: SFTConfig → _BaseConfig → TrainingArguments.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from medtrain.config.problems import nearest
from medtrain.config.training import DPOConfig, SFTConfig, TrainingConfig

_TRAINERS = {
    "sft": ("trainer/sft_config.py",),
    "dpo": ("trainer/dpo_config.py",),
    "kto": ("trainer/kto_config.py",),
    "rejection": ("trainer/sft_config.py",),
    "orpo": ("trainer/dpo_config.py", "experimental/orpo/orpo_config.py"),
}
"""Files of the configurations that a field must stand in: of SFT, and of every `dpo.method`."""
_TITLES = {
    "sft": "SFTConfig has",
    "dpo": "DPOConfig has",
    "kto": "KTOConfig has",
    "rejection": "SFTConfig has",
    "orpo": "DPOConfig and ORPOConfig share",
}

_OWNED = {
    "output_dir": "medtrain names all files",
    "seed": "set `seed`",
    "data_seed": "set `seed`",
    "num_train_epochs": "set `epochs`",
    "per_device_train_batch_size": "set `batch_size`",
    "per_device_eval_batch_size": "set `eval_batch_size`",
    "gradient_accumulation_steps": "set `gradient_accumulation`",
    "lr_scheduler_type": "set `scheduler`",
    "warmup_steps": "set `warmup_ratio`",
    "optim": "set `optimizer`",
    "logging_steps": "set `log_every`",
    "eval_steps": "set `evals_per_epoch`",
    "save_steps": "set `evals_per_epoch`",
    "eval_strategy": "set `evals_per_epoch`",
    "save_strategy": "set `evals_per_epoch`",
    "load_best_model_at_end": "set `keep_best`",
    "remove_unused_columns": "medtrain hands over token ids",
    "assistant_only_loss": "set `loss_on`",
    "completion_only_loss": "set `loss_on`",
    "push_to_hub": "use `medtrain push`",
    "save_total_limit": "medtrain keeps the best and the newest checkpoint",
    "save_only_model": "a checkpoint without its optimiser cannot be resumed",
    "auto_find_batch_size": "a resumed run must find the same batches",
    "resume_from_checkpoint": "medtrain resumes by itself",
    "dataset_kwargs": "medtrain hands over token ids",
    "chat_template_path": "set `model.chat_template`",
    "eos_token": "set `model.chat_template`",
    "pad_token": "set `model.chat_template`",
    "model_init_kwargs": "set `model`",
    "gradient_checkpointing": "set `activation_checkpointing`",
    "bf16": "set `model.dtype`",
    "deepspeed": "set `train.strategy`",
    "fsdp": "set `train.strategy`",
    "use_liger_kernel": "set `train.liger`",
    "torch_compile": "set `train.compile`",
    "report_to": "set `train.trackers`",
    "padding_free": "set `packing`",
    "precompute_ref_log_probs": "medtrain computes the reference before it trains",
    "ld_alpha": "the reference is kept as sums over answers, not by token",
    "disable_dropout": "set `sft.lora.dropout`",
    "fp16": "set `model.dtype`",
}
_SECTIONS: dict[str, type[TrainingConfig]] = {"sft": SFTConfig, "dpo": DPOConfig}
_PLAIN_TYPES: dict[str, tuple[type, ...]] = {
    "bool": (bool,), "int": (int,), "float": (float, int), "str": (str,), "None": (type(None),),
}  # fmt: skip


def trainer_problems(tree: Mapping[str, Any]) -> list[str]:
    """A line for every key of `sft.trainer:` and `dpo.trainer:` that TRL or medtrain refuses."""
    problems: list[str] = []
    for stage in _SECTIONS:
        section = tree.get(stage)
        if not isinstance(section, Mapping):
            continue
        method = str(section.get("method", "dpo")) if stage == "dpo" else "sft"
        extra = section.get("trainer")
        if isinstance(extra, Mapping) and method in _TRAINERS:
            found = (_problem(stage, method, str(key), value) for key, value in extra.items())
            problems += filter(None, found)
    return problems


def _problem(stage: str, method: str, key: str, value: Any) -> str:
    path = f"{stage}.trainer.{key}"
    fields = trainer_fields(method)
    if key in _OWNED:
        return f"{path}: set by medtrain itself; {_OWNED[key]}"
    if key in _SECTIONS[stage].model_fields:
        return f"{path}: set `{stage}.{key}` instead"
    if key not in fields:
        return f"{path}: TRL's {_TITLES[method]} no such field.{nearest(key, fields)}"
    if not _fits(value, fields[key]):
        return f"{path}: {value!r} is not of type {fields[key]}"
    return ""


def _fits(value: Any, annotation: str) -> bool:
    """Whether a value is of a type that is written in plain words; any value is of another type."""
    kinds = [kind.strip() for kind in annotation.split("|")]
    if not all(kind in _PLAIN_TYPES for kind in kinds):
        return True
    if isinstance(value, bool):
        return "bool" in kinds
    return any(isinstance(value, _PLAIN_TYPES[kind]) for kind in kinds)


@lru_cache
def trainer_fields(method: str) -> dict[str, str]:
    """The fields of TRL's configuration as installed, with their types.

    Args:
        method: `sft`, or one of `dpo.method`.
    """
    trl = _package("trl")
    common: dict[str, str] = {}
    for file in (_package("transformers") / "training_args.py", trl / "trainer/base_config.py"):
        common.update(_dataclass_fields(file))
    each = [_dataclass_fields(trl / file) for file in _TRAINERS[method]]
    shared = set(each[0]).intersection(*each[1:])
    return {**common, **{name: kind for name, kind in each[0].items() if name in shared}}


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{name} is not installed", name=name)
    return Path(spec.submodule_search_locations[0])


def _dataclass_fields(file: Path) -> dict[str, str]:
    if not file.exists():
        return {}
    module = ast.parse(file.read_text(encoding="utf-8"))
    return {
        statement.target.id: ast.unparse(statement.annotation)
        for node in module.body
        if isinstance(node, ast.ClassDef) and node.decorator_list
        for statement in node.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    }
