"""What `plan` expects a training to take is what it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from medtrain.run import Trained
from tests.gpu.conftest import BENCH

pytestmark = pytest.mark.gpu
_OFF = 0.10


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "computed-again"])
@pytest.mark.parametrize("quantized", [True, False], ids=["nf4", "16-bit"])
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_the_peak_is_as_estimated(
    stage: Trained,
    quantized: bool,
    checkpointing: bool,
    device: torch.device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    from random_llama import MIDDLE, TINY  # type: ignore[import-not-found]
    from training import Setting, Training  # type: ignore[import-not-found]

    size: dict[str, Any] = {"shape": MIDDLE, "batch": 4, "steps": 3}
    if device.type == "cpu":
        size = {"shape": TINY, "batch": 2, "steps": 1}
    setting = Setting(**size, quantized=quantized, checkpointing=checkpointing)
    measured = Training(tmp_path, setting).medtrain(stage)
    assert measured.expected_bytes > 0
    if device.type == "cuda":
        assert abs(measured.memory_error) <= _OFF, f"{measured.memory_error:+.1%} of the peak"
