"""The acceptance tests themselves work: whatever of them needs no card is run here, tiny."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_SUITE = (sys.executable, "-m", "pytest", "-m", "gpu", "-n", "0", "tests/gpu")
_NEED_A_CARD = 10
"""Tests that may be skipped without one."""


def _run(**environment: str) -> subprocess.CompletedProcess[str]:
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "MEDTRAIN_"))}
    return subprocess.run(
        [*_SUITE, "-p", "no:cacheprovider", "-rs"],
        env={**ours, "CUDA_VISIBLE_DEVICES": "", **environment},
        cwd=_ROOT, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_what_needs_no_card_passes_on_a_cpu() -> None:
    done = _run(MEDTRAIN_GPU_TESTS_ON_CPU="1")
    assert done.returncode == 0, done.stdout[-6000:]
    skipped = re.search(r"(\d+) skipped", done.stdout)
    assert skipped is None or int(skipped[1]) <= _NEED_A_CARD, done.stdout[-3000:]
    assert "whole quickstart" in done.stdout


def test_without_a_card_all_are_skipped_and_say_why() -> None:
    done = _run()
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" not in done.stdout
    assert "no CUDA card here" in done.stdout
