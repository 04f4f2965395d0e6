"""A training that is asked to stop saves where it is, and ends as if nobody had asked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from medtrain.errors import TryAgainError
from medtrain.files import read_jsonl
from medtrain.run import Trained
from medtrain.train import checkpoints
from medtrain.train.checkpoints import newest_whole
from medtrain.train.preemption import StopRequest
from medtrain.train.telemetry import Telemetry
from medtrain.train.trainers import AdapterTrainer
from tests.train.conftest import MakeRun, Ready, give_sft, make_ready
from tests.train.training import (
    same_training,
    stopped_at,
    stopped_evaluating,
    train,
)

_ROOT = Path(__file__).resolve().parents[2]
_CHILD = """
import sys
from importlib import import_module
from pathlib import Path
from medtrain.config import load_config
from medtrain.console import Console, quiet_libraries
from medtrain.errors import MedtrainError
from medtrain.run import Run
quiet_libraries()
stage, root = sys.argv[1], Path(sys.argv[2])
train = getattr(import_module(f"medtrain.train.{stage}"), f"train_{stage}")
try:
    train(Run(root), load_config(root), Console(quiet=True))
except MedtrainError as error:
    print(error)
    sys.exit(error.exit_code)
"""
# Evaluations and lines of metrics fall on different steps.
_SFT = {"sft": {"epochs": 2, "evals_per_epoch": 2, "log_every": 4, "eval_batch_size": 1,
                "max_length": 64, "lora": {"r": 4, "dropout": 0.1}}}  # fmt: skip
_DPO = {"dpo": {"epochs": 2, "evals_per_epoch": 2, "log_every": 3, "eval_batch_size": 1}}
_OPTIONS: dict[Trained, dict[str, Any]] = {"sft": _SFT, "dpo": _DPO}
_EPOCH: dict[Trained, int] = {"sft": 6, "dpo": 5}
"""Steps that the rows make."""


@pytest.fixture(scope="module")
def undisturbed(
    base_dir: Path, sft_done: Ready, tmp_path_factory: pytest.TempPathFactory
) -> dict[Trained, Ready]:
    """Both stages, trained in one go."""
    found: dict[Trained, Ready] = {}
    for stage in _OPTIONS:
        root = tmp_path_factory.mktemp("undisturbed") / stage
        found[stage] = ready = make_ready(root, base_dir, **_OPTIONS[stage])
        if stage == "dpo":
            give_sft(sft_done, ready)
        counts = train(ready, stage)
        assert counts["steps"] == 2 * _EPOCH[stage]
    return found


@pytest.mark.parametrize(
    ("stage", "step"),
    [("sft", 1), ("sft", 5), ("sft", 6), ("sft", 12), ("dpo", 1), ("dpo", 7), ("dpo", 10)],
)
def test_stopped_after_a_step_it_ends_with_the_same_bytes(
    make_dpo_run: MakeRun,
    undisturbed: dict[Trained, Ready],
    monkeypatch: pytest.MonkeyPatch,
    stage: Trained,
    step: int,
) -> None:
    ready = make_dpo_run(**_OPTIONS[stage])
    error = stopped_at(ready, stage, monkeypatch, step)
    assert error.exit_code == 75
    found, refused = newest_whole(ready.run.checkpoints(stage))
    assert found is not None
    assert not refused
    assert found.step == step
    train(ready, stage)
    same_training(ready.run, undisturbed[stage].run, stage)


@pytest.mark.parametrize(("stage", "step"), [("sft", 3), ("sft", 12), ("dpo", 4)])
def test_stopped_in_an_evaluation_it_evaluates_first(
    make_dpo_run: MakeRun,
    undisturbed: dict[Trained, Ready],
    monkeypatch: pytest.MonkeyPatch,
    stage: Trained,
    step: int,
) -> None:
    ready = make_dpo_run(**_OPTIONS[stage])
    stopped_evaluating(ready, stage, monkeypatch, step)
    found, _ = newest_whole(ready.run.checkpoints(stage))
    assert found is not None
    assert found.step == step
    assert not found.evaluated
    assert not found.finished
    assert not [line for line in found.history if "eval_loss" in line and line["step"] == step]
    train(ready, stage)
    same_training(ready.run, undisturbed[stage].run, stage)


def test_stopped_again_and_again_it_still_ends_with_the_same_bytes(
    make_run: MakeRun, undisturbed: dict[Trained, Ready], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while it makes up for the evaluation in which it was stopped before."""
    ready = make_run(**_SFT)
    stopped_at(ready, "sft", monkeypatch, 1)
    stopped_evaluating(ready, "sft", monkeypatch, 3)
    stopped_evaluating(ready, "sft", monkeypatch, 3)
    stopped_at(ready, "sft", monkeypatch, 4)
    stopped_at(ready, "sft", monkeypatch, 7)
    train(ready, "sft")
    same_training(ready.run, undisturbed["sft"].run, "sft")


def test_an_early_stop_that_the_evaluation_left_over_decides(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    wild = {"learning_rate": 0.3, "scheduler": "constant", "evals_per_epoch": 4, "epochs": 5,
            "early_stopping": 2, "batch_size": 4, "max_grad_norm": 100.0, "eval_batch_size": 1,
            "max_length": 64, "lora": {"r": 4, "dropout": 0.0}}  # fmt: skip
    whole, stopped = make_run("whole", sft=wild), make_run("stopped", sft=wild)
    expected = train(whole, "sft")
    assert expected["steps"] < 40
    stopped_evaluating(stopped, "sft", monkeypatch, expected["steps"])
    assert train(stopped, "sft") == expected
    same_training(stopped.run, whole.run, "sft")


def test_a_death_while_an_evaluation_is_added_costs_nothing_but_time(
    make_run: MakeRun, undisturbed: dict[Trained, Ready], monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = make_run(**_SFT)
    stopped_evaluating(ready, "sft", monkeypatch, 6)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "complete", _die)
        with pytest.raises(_Killed):
            train(ready, "sft")
    found, _ = newest_whole(ready.run.checkpoints("sft"))
    assert found is not None
    assert found.step == 3
    train(ready, "sft")
    same_training(ready.run, undisturbed["sft"].run, "sft")


class _Killed(Exception):  # noqa: N818 - not an error: a process that ends here
    """Stands for the death of the process at a chosen line."""


def _die(*args: Any, **kwargs: Any) -> None:
    raise _Killed


def test_checkpoints_between_evaluations_change_nothing(
    make_run: MakeRun, undisturbed: dict[Trained, Ready], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    save = AdapterTrainer._save_checkpoint

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        saved.append(self.state.global_step)
        save(self, *args, **kwargs)

    monkeypatch.setattr(AdapterTrainer, "_save_checkpoint", counted)
    ready = make_run(sft={**_SFT["sft"], "checkpoint_steps": 4})
    train(ready, "sft")
    assert saved == [3, 4, 6, 8, 9, 12]
    same_training(ready.run, undisturbed["sft"].run, "sft")


def test_asked_before_it_began_it_stops_after_a_step(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "stop").touch()
    monkeypatch.setenv("MEDTRAIN_STOP_FILE", str(tmp_path / "stop"))
    with pytest.raises(TryAgainError, match="at step 1 of 4"):
        train(make_run(sft={"max_steps": 4}), "sft")


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_stops_a_training_at_that_step(
    make_run: MakeRun,
    undisturbed: dict[Trained, Ready],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    def on_step_begin(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            os.kill(os.getpid(), number)

    ready = make_run(**_SFT)
    before = signal.signal(number, lambda got, frame: pytest.fail("it should save first"))
    try:
        with monkeypatch.context() as patched:
            patched.setattr(Telemetry, "on_step_begin", on_step_begin)
            with pytest.raises(TryAgainError, match="at step 2 of 12"):
                train(ready, "sft")
    finally:
        signal.signal(number, before)
    train(ready, "sft")
    same_training(ready.run, undisturbed["sft"].run, "sft")


def test_a_process_that_is_told_to_end_saves_first(make_run: MakeRun) -> None:
    ready = make_run(sft={**_SFT["sft"], "epochs": 60, "evals_per_epoch": 0.02, "log_every": 1})
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, "sft", str(ready.run.root)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    while not _steps_logged(ready):
        assert child.poll() is None, child.communicate()[0]
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    output = child.communicate(timeout=300)[0]
    assert child.returncode == 75, output
    found, _ = newest_whole(ready.run.checkpoints("sft"))
    assert found is not None
    assert f"at step {found.step} of 360" in output
    assert found.step == _steps_logged(ready)
    assert not found.finished


def _steps_logged(ready: Ready) -> int:
    path = ready.run.metrics("sft")
    if not path.exists() or not path.read_text().endswith("\n"):
        return 0
    return max((line["step"] for line in read_jsonl(path)), default=0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_second_signal_acts_as_it_did_before(number: signal.Signals) -> None:
    heard: list[int] = []
    before = signal.signal(number, lambda got, frame: heard.append(got))
    try:
        stop = StopRequest()
        with stop.listening():
            assert not stop.here
            signal.raise_signal(number)
            assert stop.here
            assert heard == []
            signal.raise_signal(number)
            assert heard == [number]
        signal.raise_signal(number)
        assert heard == [number, number]
    finally:
        signal.signal(number, before)


def test_a_handler_that_python_does_not_know_is_no_obstacle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that a C library has installed: `getsignal` gives None, which `signal` does not take."""
    monkeypatch.setattr("medtrain.train.preemption.signal.getsignal", lambda number: None)
    stop = StopRequest()
    before = [signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with stop.listening():
        signal.raise_signal(signal.SIGUSR1)
        assert stop.here
    for number, handler in zip((signal.SIGTERM, signal.SIGUSR1), before, strict=True):
        signal.signal(number, handler)
    signal.signal(signal.SIGUSR2, signal.SIG_DFL)


def test_the_file_is_looked_for_until_it_is_there(tmp_path: Path) -> None:
    stop = StopRequest(tmp_path / "stop")
    assert not stop.agreed(torch.device("cpu"))
    (tmp_path / "stop").touch()
    assert stop.agreed(torch.device("cpu"))
    (tmp_path / "stop").unlink()
    assert stop.here
