"""`RunConfig`: the whole of a run, and the rules that join its sections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, ValidationError

from medtrain.config.answers import EvaluateConfig, GenerateConfig, JudgeConfig, ReportConfig
from medtrain.config.base import Section
from medtrain.config.cluster import ClusterConfig
from medtrain.config.data import DataConfig
from medtrain.config.model import MergeConfig, ModelConfig
from medtrain.config.training import DPOConfig, SFTConfig, TrainConfig


class RunConfig(Section):
    """Every knob of a run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The run's directory under `output_dir`; taken from the file's name where it is left out."""
    output_dir: str = "runs"
    """Where runs are kept; relative to the working directory."""
    seed: int = 42
    """Seeds training, and with the row's id every sampled answer."""
    model: ModelConfig
    """The base model and the chat format."""
    data: DataConfig
    """Sources, filters, duplicates and splits."""
    sft: SFTConfig = SFTConfig()
    """Supervised fine-tuning."""
    dpo: DPOConfig = DPOConfig()
    """Direct preference optimisation."""
    merge: MergeConfig = MergeConfig()
    """From adapter to plain model."""
    generate: GenerateConfig = GenerateConfig()
    """Candidate answers for preferences."""
    judge: JudgeConfig = JudgeConfig()
    """Who compares and rates answers."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Models and measures."""
    report: ReportConfig = ReportConfig()
    """What is shown."""
    train: TrainConfig = TrainConfig()
    """Devices of a training stage."""
    cluster: ClusterConfig = ClusterConfig()
    """Slurm: resources and environment of jobs."""


def joint_problems(tree: Mapping[str, Any]) -> list[str]:
    """A line for every rule between sections that does not hold.

    The tree may have other mistakes: a rule is left out where a section it reads has one.
    """
    section = {name: _sound(name, tree) for name in ("model", "sft", "dpo", "generate", "evaluate")}
    model = section["model"]
    problems: list[str] = []
    for name in ("sft", "dpo"):
        trained = section[name]
        if trained and model and trained.packing is True and model.attention == "eager":
            problems.append(
                f"{name}.packing needs another model.attention than eager, with which a row would "
                "attend to its neighbours"
            )
    for name in ("generate", "evaluate"):
        answers = section[name]
        if answers and answers.engine == "openai" and not answers.base_url:
            problems.append(f"{name}.engine=openai needs {name}.base_url")
    return problems


def _sound(name: str, tree: Mapping[str, Any]) -> Any:
    """A section of the tree; None where it has a mistake of its own."""
    kind: Any = RunConfig.model_fields[name].annotation
    try:
        return kind.model_validate(tree.get(name, {}))
    except ValidationError:
        return None
