"""What a stage computes with stands in its log; what makes it slow is warned of."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from medtrain.attention import Choice
from medtrain.console import Console
from medtrain.train import computing


def told(
    monkeypatch: pytest.MonkeyPatch, directory: Path, choice: Choice, device: str = "cuda"
) -> str:
    model: Any = SimpleNamespace(device=torch.device(device))
    monkeypatch.setattr(computing, "kernel_of", lambda model: choice)
    log = directory / "run.log"
    computing.tell_attention(model, "sft", Console(log, quiet=True), packed=True)
    return log.read_text()


def test_a_kernel_that_should_work_and_does_not_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = Choice("efficient", "no varlen: its results are wrong here", surprising=True)
    said = told(monkeypatch, tmp_path, broken)
    assert "event=attention stage=sft packed=True by=efficient" in said
    assert "event=attention_failed" in said
    assert "no varlen: its results are wrong here" in said


def test_row_by_row_is_slow_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "event=attention_slow" in told(monkeypatch, tmp_path, Choice("rows", "old"))


@pytest.mark.parametrize(
    ("choice", "device"), [(Choice("varlen", ""), "cuda"), (Choice("rows", "no GPU"), "cpu")]
)
def test_what_is_as_expected_is_only_written_down(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, choice: Choice, device: str
) -> None:
    assert "level=warning" not in told(monkeypatch, tmp_path, choice, device)
