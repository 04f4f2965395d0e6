"""What a run takes from the hub: models and datasets by id.

model.base, evaluate.variants, a judge of kind `model`, the BERTScore encoder, data.sources → hub
ids with their revisions. Built-in things and local paths are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medtrain.config import RunConfig, SourceConfig, VariantConfig
from medtrain.data.reading import BUILT_IN, resolve
from medtrain.errors import DataError


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model repository."""

    name: str
    revision: str | None
    why: str
    """The key of the configuration that names it."""
    weights: bool = True
    """Whether the run loads its weights, or its tokenizer and configuration only."""
    code: bool = False
    """Whether the run executes the Python files in it (`model.trust_remote_code`)."""


@dataclass(frozen=True, slots=True)
class HubData:
    """One dataset of a source."""

    name: str
    source: SourceConfig
    why: str


def models_needed(config: RunConfig) -> list[HubModel]:
    """The models that come from the hub, each once.

    Raises:
        DataError: a name is neither a hub id nor a directory that is there.
    """
    model, evaluate = config.model, config.evaluate
    code = model.trust_remote_code
    found = [HubModel(model.base, model.revision, "model.base", code=code)]
    local_answers = evaluate.engine != "openai"
    found += [
        HubModel(v.path, v.revision, f"evaluate.variants, {v.name}", local_answers, code)
        for v in evaluate.variants
        if isinstance(v, VariantConfig)
    ]
    if config.judge.kind == "model":
        found.append(HubModel(config.judge.model, None, "judge.model"))
    if evaluate.bertscore_model is not None:
        found.append(HubModel(evaluate.bertscore_model, None, "evaluate.bertscore_model"))
    merged: dict[tuple[str, str | None], HubModel] = {}
    for need in found:
        if _is_hub_id(need):
            known = merged.setdefault((need.name, need.revision), need)
            if need.weights and not known.weights:
                merged[need.name, need.revision] = need
    return list(merged.values())


def datasets_needed(config: RunConfig) -> list[HubData]:
    """The datasets that come from the hub.

    Raises:
        DataError: a source names a file that is not there.
    """
    return [
        HubData(one.name, source, f"data.sources.{place}")
        for place, source in enumerate(config.data.sources)
        for one in resolve(source)
        if one.is_dataset and not one.files and not Path(one.name).is_dir()
    ]


def _is_hub_id(need: HubModel) -> bool:
    name = need.name
    if name.startswith(BUILT_IN) or Path(name).expanduser().is_dir():
        return False
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise DataError(
            f"{need.why}: there is no directory {name}",
            fix="Give a directory that is there, or a hub id such as HuggingFaceTB/SmolLM2-135M.",
        )
    return True
