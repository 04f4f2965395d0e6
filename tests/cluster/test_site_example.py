"""The site's example is a configuration that loads, whole and as people will edit it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

from medtrain.cluster.site import resources_of, sbatch_options, setup_lines
from medtrain.config import ClusterConfig, JobKind, RunConfig, load_config
from tests.small_run import write_config

EXAMPLE = Path(__file__).parents[2] / "slurm" / "site.example.yaml"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A small run at the example's site."""
    monkeypatch.setenv("MEDTRAIN_SITE", str(EXAMPLE))
    base = tmp_path / "base"
    base.mkdir()
    return load_config(write_config(tmp_path, base))


def test_it_is_laid_under_a_run(config: RunConfig) -> None:
    assert config.cluster.site == str(EXAMPLE)
    assert sbatch_options(config, "generate")["gpus-per-node"] == "a100:1"
    assert sbatch_options(config, "sft")["nodes"] == 2
    assert sbatch_options(config, "cpu")["partition"] == "cpu"
    assert "gpus-per-node" not in sbatch_options(config, "cpu")
    assert "module load CUDA/12.4" in setup_lines(config)
    assert any("HF_HOME=/project/med-nlp/huggingface" in line for line in setup_lines(config))


def test_every_kind_of_job_is_asked_for(config: RunConfig) -> None:
    for kind in get_args(JobKind):
        wanted = resources_of(config, kind)
        assert wanted.account == "med-nlp"
        assert wanted.time_min


def test_what_is_commented_out_is_valid_too() -> None:
    """Every `# key: value` line of the example, put in one by one."""
    lines = re.findall(r"^ *# ([a-z_-]+: .+)$", EXAMPLE.read_text(), re.MULTILINE)
    known = set(ClusterConfig.model_fields)
    tried = [yaml.safe_load(line) for line in lines if line.partition(":")[0] in known]
    assert {key for tree in tried for key in tree} >= {"qos", "container", "srun", "secrets_file"}
    for tree in tried:
        ClusterConfig.model_validate(tree)


def test_it_shows_what_a_site_may_set() -> None:
    shown = EXAMPLE.read_text()
    missing = [name for name in ClusterConfig.model_fields if f"{name}:" not in shown]
    assert missing == ["nodes", "site"] or missing == ["site"]
