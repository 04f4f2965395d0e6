"""What the tests of training do with a run that is ready for it: train, stop, compare."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from medtrain.environment import STOP_FILE_VARIABLE
from medtrain.errors import TryAgainError
from medtrain.run import Run, Trained
from medtrain.train.dpo import train_dpo
from medtrain.train.sft import train_sft
from medtrain.train.step import StepTrainer
from medtrain.train.telemetry import Telemetry
from tests.train.conftest import Ready, adapter_bytes

TRAIN = {"sft": train_sft, "dpo": train_dpo}
SPEED = ("tokens_per_s", "step_s", "data_wait_s", "memory_peak_bytes", "mfu")
"""Figures of `metrics.jsonl` that a clock or the machine decides."""


def train(ready: Ready, stage: Trained) -> dict[str, Any]:
    return TRAIN[stage](*ready)


def metrics(run: Run, stage: Trained) -> list[dict[str, Any]]:
    """The lines, which must be strict JSON, without what a clock decides."""

    def refuse(word: str) -> None:
        pytest.fail(f"{word} is not JSON")

    lines = run.metrics(stage).read_text().splitlines()
    read = [json.loads(line, parse_constant=refuse) for line in lines]
    return [{name: value for name, value in line.items() if name not in SPEED} for line in read]


def losses(run: Run, stage: Trained, kind: str = "train") -> list[float]:
    return [line["loss"] for line in metrics(run, stage) if line["kind"] == kind]


def same_training(one: Run, other: Run, stage: Trained) -> None:
    """Both ended with the same adapter, after the same steps."""
    assert adapter_bytes(one, stage) == adapter_bytes(other, stage)
    assert metrics(one, stage) == metrics(other, stage)


def stopped_at(
    ready: Ready, stage: Trained, monkeypatch: pytest.MonkeyPatch, step: int
) -> TryAgainError:
    """Train until a step in the middle of which the launcher's file says stop."""
    file = ready.run.root / "stop"

    def on_step_begin(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step - 1:
            file.touch()

    with monkeypatch.context() as patched:
        patched.setattr(Telemetry, "on_step_begin", on_step_begin)
        return _stopped(ready, stage, patched, step)


def stopped_evaluating(
    ready: Ready, stage: Trained, monkeypatch: pytest.MonkeyPatch, step: int
) -> TryAgainError:
    """Train until the evaluation after a step, which is asked to stop after one forward pass."""
    file = ready.run.root / "stop"
    forwards = StepTrainer.get_eval_dataloader

    def one_by_one(self: Any, dataset: Any = None) -> Iterator[Any]:
        for number, each in enumerate(forwards(self, dataset)):
            if number == 1 and self.state.global_step == step:
                file.touch()
            yield each

    with monkeypatch.context() as patched:
        patched.setattr(StepTrainer, "get_eval_dataloader", one_by_one)
        return _stopped(ready, stage, patched, step)


def _stopped(ready: Ready, stage: Trained, patched: pytest.MonkeyPatch, step: int) -> TryAgainError:
    file = ready.run.root / "stop"
    patched.setenv(STOP_FILE_VARIABLE, str(file))
    with pytest.raises(TryAgainError, match=f"at step {step} of") as caught:
        train(ready, stage)
    file.unlink()
    return caught.value
