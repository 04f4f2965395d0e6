"""What the tests of every room share.

One thread a process: pytest runs a worker a core, and threads that wait for each other on a busy
core make a tiny model fifty times slower.
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from hypothesis import HealthCheck, settings

from tests.tiny import shared_directory, tiny_base

settings.register_profile(
    "medtrain", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("medtrain")


def pytest_configure(config: pytest.Config) -> None:
    """Only `pytest -m gpu` sees a GPU: all other tests are about a machine without one."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama base without chat tokens; read-only by agreement."""
    return tiny_base(shared_directory(tmp_path_factory.getbasetemp()) / "tiny-base")
