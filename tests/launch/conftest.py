"""A run, a configuration of which only `train:` and `model:` matter, and a clean environment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from medtrain.config import RunConfig, parse_config
from medtrain.environment import is_launched
from medtrain.run import Run


def config(model: dict[str, object] | None = None, **train: object) -> RunConfig:
    return parse_config({"name": "r", "model": {"base": "b", **(model or {})}, "train": train,
                         "data": {"sources": [{"adapter": "table", "path": "x"}]}})  # fmt: skip


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "ACCELERATE_", "MEDTRAIN_")) or name in (
            "RANK",
            "LOCAL_RANK",
        ):
            monkeypatch.delenv(name)
    assert not is_launched()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = Run(tmp_path / "run")
    made.create()
    return made
