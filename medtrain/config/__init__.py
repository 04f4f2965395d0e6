"""The configuration of a run: one YAML file, checked as a whole before anything happens.

file → `extends:` parents underneath it → `dotted.key=value` overrides on top → RunConfig, or one
ConfigError that lists every problem with its path, the valid values and the nearest name.
"""

from medtrain.config.answers import (
    EngineConfig,
    EvaluateConfig,
    GenerateConfig,
    JudgeConfig,
    ReportConfig,
    VariantConfig,
)
from medtrain.config.cluster import ClusterConfig, JobKind, Resources
from medtrain.config.data import (
    ChatSource,
    DataConfig,
    FilterConfig,
    MedicalQASource,
    MedQuADSource,
    PreferencesSource,
    PubMedQASource,
    Source,
    SourceConfig,
    TableSource,
)
from medtrain.config.load import dump_config, load_config, parse_config, site_section
from medtrain.config.model import DEFAULT_SYSTEM_PROMPT, LoraConfig, MergeConfig, ModelConfig
from medtrain.config.training import DPOConfig, SFTConfig, TrainConfig, TrainingConfig
from medtrain.config.tree import RunConfig

__all__ = [
    "DEFAULT_SYSTEM_PROMPT",
    "ChatSource",
    "ClusterConfig",
    "DPOConfig",
    "DataConfig",
    "EngineConfig",
    "EvaluateConfig",
    "FilterConfig",
    "GenerateConfig",
    "JobKind",
    "JudgeConfig",
    "LoraConfig",
    "MedQuADSource",
    "MedicalQASource",
    "MergeConfig",
    "ModelConfig",
    "PreferencesSource",
    "PubMedQASource",
    "ReportConfig",
    "Resources",
    "RunConfig",
    "SFTConfig",
    "Source",
    "SourceConfig",
    "TableSource",
    "TrainConfig",
    "TrainingConfig",
    "VariantConfig",
    "dump_config",
    "load_config",
    "parse_config",
    "site_section",
]
