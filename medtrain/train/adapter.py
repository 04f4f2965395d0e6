"""LoRA adapters: put on a base, written to files, read back, and refused where they do not fit.

LoraConfig + base → target names checked → PeftModel whose trainable weights are float32 (LoRA's
matrices, and the rows of tokens that are new to the model) → `write_adapter` (the same weights give
the same bytes) → `attach_adapter` on the same base in a later stage.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
from peft.utils import set_peft_model_state_dict
from peft.utils.other import TrainableTokensWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from medtrain.config import LoraConfig
from medtrain.config.problems import nearest
from medtrain.errors import AdapterMismatchError, ConfigError, DataError
from medtrain.files import read_json, write_json
from medtrain.train.adapter_fit import (
    CONFIG_FILE,
    FACTS_FILE,
    WEIGHTS_FILE,
    AdapterFacts,
    check_facts,
    check_vocabulary,
)
from medtrain.train.new_tokens import keep_token_numbers

__all__ = ["CONFIG_FILE", "FACTS_FILE", "WEIGHTS_FILE", "AdapterFacts"]

if TYPE_CHECKING:
    from medtrain.data.chat import ChatTokenizer


def add_adapter(model: Any, lora: LoraConfig, chat: ChatTokenizer, *, seed: int) -> Any:
    """A PeftModel with a fresh trainable adapter named `default`; A is drawn from `seed`, B is 0.

    Raises:
        ConfigError: a target is no linear layer of the model.
    """
    config = PeftLoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=_checked_targets(model, lora.targets),
        trainable_token_indices=_trainable_rows(model, chat.new_token_ids),
        use_rslora=lora.rslora,
        use_dora=lora.dora,
    )
    torch.manual_seed(seed)
    return _in_full_precision(get_peft_model(model, config))


def attach_adapter(
    model: Any, adapter_dir: Path, *, trainable: bool = False, name: str = "default"
) -> Any:
    """A PeftModel with the adapter of a directory, its weights in float32.

    Raises:
        DataError: the directory holds no adapter, or a damaged one.
        AdapterMismatchError: the adapter was made for another base or another vocabulary.
    """
    config = _read_config(adapter_dir)
    check_facts(model, adapter_dir)
    check_vocabulary(model, adapter_dir, config)
    config.inference_mode = not trainable
    try:
        wrapped = get_peft_model(model, config, adapter_name=name)
        load_weights(wrapped, read_weights(adapter_dir), name=name)
    except (RuntimeError, ValueError, KeyError) as error:
        raise AdapterMismatchError(
            f"The adapter {adapter_dir} does not fit {model.name_or_path}: {_essence(error)}",
            fix="Load it on the base it was trained on, or train it again on this one.",
        ) from error
    _in_full_precision(wrapped)
    return wrapped if trainable else wrapped.eval()


def load_weights(model: Any, weights: Mapping[str, torch.Tensor], *, name: str = "default") -> None:
    """Put the weights of an adapter file into an adapter that the model has.

    Raises:
        RuntimeError: a shape differs, or a weight is missing.
    """
    result = set_peft_model_state_dict(model, dict(weights), adapter_name=name)
    missing = [key for key in result.missing_keys if "lora_" in key and f".{name}" in key]
    if missing or result.unexpected_keys:
        raise RuntimeError(
            f"{len(missing)} weights are missing and {len(result.unexpected_keys)} are unknown, "
            f"such as {(missing or result.unexpected_keys)[0]}"
        )


def read_weights(adapter_dir: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter directory.

    Raises:
        DataError: there is no weights file, or it is damaged.
    """
    try:
        weights: dict[str, torch.Tensor] = load_file(adapter_dir / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{adapter_dir / WEIGHTS_FILE} cannot be read: {error}",
            fix="Train the adapter again: medtrain run RUN --force sft (or dpo).",
        ) from error
    return weights


def write_adapter(
    model: Any, directory: Path, *, state_dict: Mapping[str, Any] | None = None
) -> None:
    """Write the adapter `default` of a PeftModel: weights and PEFT's configuration.

    Equal weights give equal bytes: PEFT keeps targets in a set, whose order changes from process to
    process, so they are sorted. The embedding matrix is never saved whole: its trained rows are.
    """
    weights = get_peft_model_state_dict(
        model, state_dict=state_dict, adapter_name="default", save_embedding_layers=False
    )
    directory.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: value.detach().cpu().contiguous() for key, value in weights.items()},
        directory / WEIGHTS_FILE,
        metadata={"format": "pt"},
    )
    config = copy.copy(model.peft_config["default"])
    config.inference_mode = True
    config.save_pretrained(directory)
    written = read_json(directory / CONFIG_FILE)
    for key, value in written.items():
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            written[key] = sorted(value)
    write_json(directory / CONFIG_FILE, dict(sorted(written.items())))


def adapter_shapes(model: Any) -> dict[str, torch.Size]:
    """The shape of every weight that `write_adapter` writes, by its name in the file.

    Under ZeRO-3 a process holds a part of every weight; DeepSpeed keeps the whole one's shape.
    """
    whole = {
        name: torch.empty(getattr(p, "ds_shape", p.shape), device="meta")
        for name, p in model.named_parameters()
        if "lora_" in name or "trainable_tokens" in name
    }
    named = get_peft_model_state_dict(
        model, state_dict=whole, adapter_name="default", save_embedding_layers=False
    )
    return {name: weight.shape for name, weight in named.items()}


def trainable_parameters(model: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Names and parameters that an optimiser would change."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def _in_full_precision(model: Any) -> Any:
    """Trainable weights as float32: steps of size lr x gradient vanish in bfloat16's 8 bits."""
    for _, parameter in trainable_parameters(model):
        parameter.data = parameter.data.to(torch.float32)
    keep_token_numbers(model)
    _show_output_bias(model)
    return model


def _show_output_bias(model: Any) -> None:
    """Let TRL's fused output layer read `.bias` through PEFT's wrapper, which shows `.weight` only.

    Set around nn.Module, so that no parameter is registered twice.
    """
    output = model.get_output_embeddings()
    if isinstance(output, TrainableTokensWrapper):
        bias = getattr(output.token_adapter.get_base_layer(), "bias", None)
        object.__setattr__(output, "bias", bias)


def _checked_targets(model: Any, targets: str | list[str]) -> str | list[str]:
    output = model.get_output_embeddings()
    linear = [
        path
        for path, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not output
    ]
    names = sorted({path.rpartition(".")[2] for path in linear})
    if isinstance(targets, str):
        return _all_linear(model, linear, names)
    unknown = [t for t in targets if not any(p == t or p.endswith(f".{t}") for p in linear)]
    if not targets or unknown:
        what = f"has no linear layer {', '.join(map(repr, unknown))}" if targets else "got no names"
        raise ConfigError(
            f"sft.lora.targets: {model.config.model_type} {what}."
            + "".join(nearest(target, names) for target in unknown)
            + f" Its linear layers: {', '.join(names)}",
            fix="Name some of them, or write `targets: all-linear`.",
        )
    return list(targets)


def _all_linear(model: Any, linear: list[str], names: list[str]) -> str | list[str]:
    """All linear layers but the output layer, by name.

    PEFT would list every path of a small model, and such an adapter would be taken without a word
    by a model with more layers. Names are what it writes for a large one.
    """
    leaves = [path for path, _ in model.named_modules() if path.rpartition(".")[2] in names]
    return names if set(leaves) == set(linear) else "all-linear"


def _trainable_rows(model: Any, token_ids: list[int]) -> dict[str, list[int]] | None:
    """PEFT's `trainable_token_indices`: the new tokens' rows, of the output layer too if untied."""
    if not token_ids:
        return None
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    layers = [embedding]
    if output is not None and output.weight is not embedding.weight:
        layers.append(output)
    names = {id(module): path for path, module in model.named_modules()}
    return {names[id(layer)]: list(token_ids) for layer in layers}


def _read_config(adapter_dir: Path) -> Any:
    if not (adapter_dir / CONFIG_FILE).is_file():
        raise DataError(
            f"{adapter_dir} holds no adapter: there is no {CONFIG_FILE} in it",
            fix="Train one: medtrain run CONFIG --until sft (or dpo).",
        )
    try:
        return PeftConfig.from_pretrained(str(adapter_dir))
    except (ValueError, TypeError, KeyError, json.JSONDecodeError) as error:
        raise DataError(
            f"{adapter_dir / CONFIG_FILE} is no adapter configuration that PEFT can read: "
            f"{_essence(error)}"
        ) from error


def _essence(error: BaseException) -> str:
    """PEFT and torch list every mismatched tensor: the first says it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "size mismatch" in line]
    return (telling or lines or [type(error).__name__])[0]
