"""A training that was killed ends with the bytes of one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from medtrain.files import read_jsonl
from medtrain.run import Trained
from medtrain.train import checkpoints, trainers
from medtrain.train.adapter import FACTS_FILE
from medtrain.train.sft import train_sft
from medtrain.train.telemetry import keep_metrics_until
from tests.train.conftest import MakeRun, Ready, adapter_bytes
from tests.train.training import metrics, same_training, stopped_at, train

_ROOT = Path(__file__).resolve().parents[2]
_CHILD = """
import os, signal, sys
from importlib import import_module
from pathlib import Path
from medtrain.config import load_config
from medtrain.console import Console, quiet_libraries
from medtrain.ending import Ending
from medtrain.run import Run
from medtrain.train.telemetry import Telemetry
ending = Ending.register()
quiet_libraries()
stage, root, *killed_at = sys.argv[1:]

def on_step_begin(self, args, state, control, **kwargs):
    if [str(state.global_step)] == killed_at:
        os.kill(os.getpid(), signal.SIGKILL)

Telemetry.on_step_begin = on_step_begin
train = getattr(import_module(f"medtrain.train.{stage}"), f"train_{stage}")
train(Run(Path(root)), load_config(Path(root)), Console(quiet=True))
ending.code = 0
"""
_LONG = {
    "sft": {"sft": {"max_steps": 40, "evals_per_epoch": 1, "log_every": 1, "batch_size": 4,
                    "lora": {"r": 4, "dropout": 0.1}}},
    "dpo": {"dpo": {"max_steps": 30, "evals_per_epoch": 1, "log_every": 1}},
}  # fmt: skip


def start(command: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)}
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def kill_after(ready: Ready, stage: Trained, step: int) -> None:
    """Train in a process of its own that dies of SIGKILL after a step."""
    child = start([sys.executable, "-c", _CHILD, stage, str(ready.run.root), str(step)])
    output = child.communicate(timeout=300)[0]
    assert child.returncode == -signal.SIGKILL, output
    assert max(line["step"] for line in metrics(ready.run, stage)) == step


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_killed_training_ends_with_the_same_bytes(
    make_run: MakeRun, make_dpo_run: MakeRun, stage: Trained
) -> None:
    make = make_run if stage == "sft" else make_dpo_run
    undisturbed, killed = make("undisturbed", **_LONG[stage]), make("killed", **_LONG[stage])
    train(undisturbed, stage)

    kill_after(killed, stage, 13)
    assert not killed.run.adapter(stage).exists()
    found, refused = checkpoints.newest_whole(killed.run.checkpoints(stage))
    assert found is not None
    assert not refused
    counts = train(killed, stage)

    assert "event=resume" in killed.run.log.read_text()
    assert counts["steps"] == (40 if stage == "sft" else 30)
    same_training(killed.run, undisturbed.run, stage)


class Killed(Exception):  # noqa: N818 - not an error: a process that ends here
    """Stands for the death of the process at a chosen line."""


def die(*args: Any, **kwargs: Any) -> None:
    raise Killed


def interrupted(ready: Ready, monkeypatch: pytest.MonkeyPatch, target: Any, name: str) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(target, name, die)
        with pytest.raises(Killed):
            train_sft(ready.run, ready.config, ready.console)


def test_a_half_written_checkpoint_is_not_resumed(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, killed = make_run("undisturbed"), make_run("killed")
    train_sft(undisturbed.run, undisturbed.config, undisturbed.console)
    # Dies when the first checkpoint's files are written, but not yet said to be whole.
    interrupted(killed, monkeypatch, checkpoints, "complete")
    directory = killed.run.checkpoints("sft")
    assert [path for path in directory.iterdir() if path.name.startswith("checkpoint-")]
    assert checkpoints.newest_whole(directory) == (None, [])
    train_sft(killed.run, killed.config, killed.console)
    assert adapter_bytes(killed.run, "sft") == adapter_bytes(undisturbed.run, "sft")


def test_a_training_that_had_finished_is_published_without_another_step(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, killed = make_run("undisturbed"), make_run("killed")
    train_sft(undisturbed.run, undisturbed.config, undisturbed.console)
    interrupted(killed, monkeypatch, checkpoints, "publish_adapter")
    monkeypatch.setattr(trainers.SupervisedTrainer, "train", die)
    train_sft(killed.run, killed.config, killed.console)
    assert adapter_bytes(killed.run, "sft") == adapter_bytes(undisturbed.run, "sft")
    # And once more, as after a kill between publication and receipt.
    train_sft(killed.run, killed.config, killed.console)
    assert adapter_bytes(killed.run, "sft") == adapter_bytes(undisturbed.run, "sft")


def test_an_early_stop_is_not_overrun_on_resume(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    wild = {"learning_rate": 0.3, "scheduler": "constant", "evals_per_epoch": 4, "epochs": 5,
            "early_stopping": 2, "batch_size": 4, "max_grad_norm": 100.0,
            "keep_best": False}  # fmt: skip
    undisturbed, killed = make_run("undisturbed", sft=wild), make_run("killed", sft=wild)
    expected = train_sft(undisturbed.run, undisturbed.config, undisturbed.console)
    interrupted(killed, monkeypatch, checkpoints, "publish_adapter")
    assert train_sft(killed.run, killed.config, killed.console) == expected
    assert adapter_bytes(killed.run, "sft") == adapter_bytes(undisturbed.run, "sft")


def test_checkpoints_of_another_plan_are_put_away(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    short, long = make_run("run", sft={"epochs": 1}), make_run("run", sft={"epochs": 2})
    interrupted(short, monkeypatch, checkpoints, "publish_adapter")
    counts = train_sft(long.run, long.config, long.console)
    assert "event=checkpoints_ignored" in long.run.log.read_text()
    steps = [line["step"] for line in read_jsonl(long.run.metrics("sft"))]
    assert steps == sorted(steps)
    assert max(steps) == counts["steps"]


def test_metrics_are_cut_back_to_the_resumed_step(tmp_path: Path) -> None:
    path = tmp_path / "sft.metrics.jsonl"
    lines = [json.dumps({"step": step}) for step in (1, 2, 2, 3)]
    path.write_text("\n".join(lines) + '\n{"step": 2, "lo')
    keep_metrics_until(path, 2)
    assert [line["step"] for line in read_jsonl(path)] == [1, 2, 2]
    keep_metrics_until(tmp_path / "none.jsonl", 2)


def test_two_processes_train_one_adapter(make_run: MakeRun, tmp_path: Path) -> None:
    ready = make_run(sft={"max_steps": 4, "evals_per_epoch": 1})
    script = tmp_path / "child.py"
    script.write_text(_CHILD)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    child = start([sys.executable, *launch, str(script), "sft", str(ready.run.root)])
    output = child.communicate(timeout=300)[0]
    assert child.returncode == 0, output
    assert (ready.run.adapter("sft") / FACTS_FILE).is_file()
    lines = list(read_jsonl(ready.run.metrics("sft")))
    steps = [(line["kind"], line["step"]) for line in lines]
    assert len(steps) == len(set(steps)), "one process keeps the books"
    states = ready.run.checkpoints("sft").glob("checkpoint-4/rng_state_*.pth")
    assert len(list(states)) == 2


def test_a_checkpoint_of_the_version_before_is_gone_on_from(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has TRL's lists of figures; the next line is about the steps since."""
    ready = make_run(sft={"max_steps": 8, "evals_per_epoch": 0, "log_every": 4})
    stopped_at(ready, "sft", monkeypatch, 3)
    checkpoint = ready.run.checkpoints("sft") / "checkpoint-3"
    file = checkpoint / "sums_0.json"
    sums = json.loads(file.read_text())
    del sums["figures"]
    sums["metrics"] = {"entropy": [1.5], "mean_token_accuracy": [0.5], "num_tokens": [99]}
    file.write_text(json.dumps(sums))
    said = json.loads((checkpoint / checkpoints._MANIFEST).read_text())
    facts = {name: said[name] for name in ("step", "finished", "evaluated")}
    checkpoints.complete(checkpoint, **facts, plan=checkpoints.Plan(**said["plan"]))
    assert train(ready, "sft")["steps"] == 8
    lines = [line for line in metrics(ready.run, "sft") if line["kind"] == "train"]
    assert [line["step"] for line in lines] == [4, 8]
    assert all("token_accuracy" in line for line in lines)
