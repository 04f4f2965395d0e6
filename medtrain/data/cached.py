"""Is everything a run takes from the hub in the cache? A look by the loaders themselves.

configuration on stdin → every model's configuration, tokenizer and weight files, every dataset,
with the hub switched off → one JSON list on stdout: name, commit, and what is missing. A process of
its own (`python -m medtrain.data.cached`): libraries read the switches when they are imported.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from medtrain.config import ModelConfig, RunConfig, parse_config
from medtrain.data.needs import HubData, HubModel, datasets_needed, models_needed
from medtrain.errors import MedtrainError
from medtrain.files import read_json

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
"""Any of these switches a library off the hub."""


def look_up(config: RunConfig) -> list[dict[str, Any]]:
    """Everything that comes from the hub: name, why, commit, and what its `problem` is."""
    return [
        *(_entry(need, _model_commit) for need in models_needed(config)),
        *(_entry(need, _dataset_commit) for need in datasets_needed(config)),
    ]


def weight_names(index: Path) -> list[str]:
    """The weight files that an index of safetensors names."""
    return sorted(set(read_json(index)["weight_map"].values()))


def _entry(need: Any, commit_of: Any) -> dict[str, Any]:
    entry = {"name": need.name, "why": need.why, "commit": None, "problem": ""}
    try:
        return {**entry, "commit": commit_of(need)}
    except MedtrainError as error:
        return {**entry, "problem": error.message}


def _model_commit(need: HubModel) -> str:
    config = _cached(need, "config.json")
    if need.weights:
        _check_weights(need)
    if not need.code:
        from medtrain.data.base import base_vocab_rows, load_base_tokenizer

        model = ModelConfig(base=need.name, revision=need.revision)
        load_base_tokenizer(need.name, model)
        base_vocab_rows(need.name, model)
    return config.parent.name


def _check_weights(need: HubModel) -> None:
    try:
        _cached(need, "model.safetensors")
    except MedtrainError:
        index = _cached(need, "model.safetensors.index.json")
        for name in weight_names(index):
            _cached(need, name)


def _cached(need: HubModel, file: str) -> Path:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(need.name, file, revision=need.revision)
    if not isinstance(found, str):
        raise MedtrainError(f"{file} is not in the cache")
    return Path(found)


def _dataset_commit(need: HubData) -> str | None:
    from medtrain.data.hub import load_hub_dataset

    return load_hub_dataset(need.name, need.source).commit


if __name__ == "__main__":
    print(json.dumps(look_up(parse_config(json.load(sys.stdin)))))
