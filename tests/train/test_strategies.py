"""Several processes, under every strategy that a CPU can run: one training, and none is lost."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from medtrain.files import read_json, read_jsonl
from medtrain.run import Run, Trained
from medtrain.train.adapter import WEIGHTS_FILE
from tests.small_run import accelerate, medtrain, torchrun, write_config
from tests.train.test_model import other_base

STRATEGIES = ["ddp", "zero2", "zero3"]
ZERO3 = Path(__file__).parents[2] / "configs" / "accelerate" / "zero3.yaml"
TOLERANCE = 2e-4
"""Relative, of a loss: sums in another order, and after them another step."""
SPEED = ("tokens_per_s", "step_s", "data_wait_s", "memory_peak_bytes", "mfu", "padding")
SETTINGS: dict[Trained, list[str]] = {
    "sft": ["sft.max_steps=10", "sft.batch_size=2", "sft.lora.dropout=0", "sft.log_every=1"],
    "dpo": ["dpo.max_steps=8", "dpo.batch_size=2", "dpo.checkpoint_steps=2"],
}
"""Rows a step: 4, of two processes, or of one that goes twice."""


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory, base_dir: Path) -> Path:
    """A run that is done up to DPO, by one process."""
    directory = tmp_path_factory.mktemp("ready")
    small = write_config(directory, base_dir)
    done = medtrain("run", small, "--until", "reference", *SETTINGS["sft"], *SETTINGS["dpo"],
                    "sft.gradient_accumulation=2", "dpo.gradient_accumulation=2")  # fmt: skip
    assert done.returncode == 0, done.stderr
    (run,) = (directory / "runs").iterdir()
    return run


@pytest.fixture(scope="module")
def alone(ready: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Trained], Run]:
    """The run of which a stage was trained by one process."""
    done: dict[str, Run] = {}

    def trained(stage: Trained) -> Run:
        if stage == "sft":
            return Run(ready)
        if stage not in done:
            run = copied(ready, tmp_path_factory.mktemp("alone"))
            result = train(run, stage, "dpo.gradient_accumulation=2")
            assert result.returncode == 0, result.stderr
            done[stage] = run
        return done[stage]

    return trained


def copied(ready: Path, directory: Path, *, without: Trained | None = None) -> Run:
    """A copy of a run, with a stage yet to be trained."""
    root = shutil.copytree(ready, directory / "run")
    if without:
        for made in (Run(root).adapter(without), Run(root).checkpoints(without)):
            shutil.rmtree(made, ignore_errors=True)
        (root / "stages" / f"{without}.json").unlink(missing_ok=True)
        Run(root).metrics(without).unlink(missing_ok=True)
    return Run(root)


def command(run: Run, stage: Trained, *overrides: str) -> list[str]:
    accumulated = f"{stage}.gradient_accumulation=1"
    return ["-m", "medtrain", stage, str(run.config), accumulated, *overrides]


def train(run: Run, stage: Trained, *overrides: str) -> subprocess.CompletedProcess[str]:
    return medtrain(*command(run, stage, *overrides)[2:], OMP_NUM_THREADS="1")


def both(strategy: str) -> list[str]:
    return ["train.processes=2", f"train.strategy={strategy}"]


def disturb(run: Run, stage: Trained, strategy: str, number: signal.Signals, after: int) -> int:
    """Send a signal once a step is logged; the exit code. SIGKILL goes to all processes."""
    child = subprocess.Popen(
        [sys.executable, *command(run, stage, *both(strategy))],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while last_step(run, stage) < after:
        assert child.poll() is None, f"{stage} ended by itself, with {child.returncode}"
        assert time.monotonic() < deadline, f"{stage} did not come far enough"
        time.sleep(0.005)
    child.send_signal(number)
    return child.wait(300)


def last_step(run: Run, stage: Trained) -> int:
    file = run.metrics(stage)
    lines = file.read_text().splitlines() if file.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def learnt(run: Run, stage: Trained) -> list[dict[str, Any]]:
    """The metrics, without what depends on the clock."""
    lines = read_jsonl(run.metrics(stage))
    return [{key: v for key, v in line.items() if key not in SPEED} for line in lines]


def losses(run: Run, stage: Trained) -> list[float]:
    return [line["loss"] for line in learnt(run, stage) if line["kind"] == "train"]


def weights(run: Run, stage: Trained) -> bytes:
    return (run.adapter(stage) / WEIGHTS_FILE).read_bytes()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_two_processes_learn_what_one_does_and_go_on_exactly(
    ready: Path, alone: Callable[[Trained], Run], tmp_path: Path, stage: Trained, strategy: str
) -> None:
    undisturbed = copied(ready, tmp_path / "undisturbed", without=stage)
    result = train(undisturbed, stage, *both(strategy))
    assert result.returncode == 0, result.stderr
    assert "built successfully" not in result.stdout, "DeepSpeed has nothing to compile"
    expected = losses(alone(stage), stage)
    assert losses(undisturbed, stage) == pytest.approx(expected, rel=TOLERANCE)

    # SFT is told to stop, and saves; DPO is killed, and goes on from its last checkpoint.
    number, after = (signal.SIGUSR1, 2) if stage == "sft" else (signal.SIGKILL, 3)
    disturbed = copied(ready, tmp_path / "disturbed", without=stage)
    code = disturb(disturbed, stage, strategy, number, after)
    assert code == (75 if stage == "sft" else -signal.SIGKILL)
    assert not disturbed.adapter(stage).exists()
    result = train(disturbed, stage, *both(strategy))
    assert result.returncode == 0, result.stderr
    assert "event=resume" in disturbed.log.read_text()
    assert learnt(disturbed, stage) == learnt(undisturbed, stage)
    assert weights(disturbed, stage) == weights(undisturbed, stage)


_SPOILT = """
import os
from medtrain.train.trainers import SupervisedTrainer
theirs, spoilt = SupervisedTrainer.computed, []

def computed(self, model, inputs, items):
    made = theirs(self, model, inputs, items)
    if os.environ["RANK"] == "1" and self.state.global_step == 3 and model.training and not spoilt:
        spoilt.append(made)
        return made._replace(loss=made.loss * float("nan"))
    return made

SupervisedTrainer.computed = computed
from medtrain.cli import main
main()
"""


def test_a_loss_that_is_no_number_in_one_process_is_left_out_by_all(
    ready: Path, tmp_path: Path
) -> None:
    """As a person launches it, under the strategy whose passes all must take part in."""
    run = copied(ready, tmp_path, without="sft")
    (tmp_path / "child.py").write_text(_SPOILT)
    program = (ZERO3, tmp_path / "child.py", *command(run, "sft")[2:])
    result = accelerate(*program, "sft.max_bad_batches=0", DS_ACCELERATOR="cpu")
    assert result.returncode == 1
    assert "no number in 1 batch of sft, up to step 4" in result.stderr
    assert last_step(run, "sft") == 3
    result = accelerate(*program, "sft.max_bad_batches=1", "--force", DS_ACCELERATOR="cpu")
    assert result.returncode == 0, result.stderr
    (undisturbed,) = [line["loss"] for line in learnt(Run(ready), "sft") if line["step"] == 3]
    found = {line["step"]: line["loss"] for line in learnt(run, "sft") if line["kind"] == "train"}
    assert found[3] == pytest.approx(undisturbed, rel=TOLERANCE)
    assert found.keys() == set(range(1, 11))
    assert all(math.isfinite(loss) for loss in found.values())
    trained = load_file(run.adapter("sft") / WEIGHTS_FILE)
    assert all(bool(weight.isfinite().all()) for weight in trained.values())


_AHEAD = """
import os
from medtrain.train import ahead, step
from medtrain.train.adapter_trainer import AdapterTrainer
ahead.DEVICES = step._READ_AHEAD_FOR = ("cpu",)
theirs = AdapterTrainer.training_step

def training_step(self, *args):
    if os.environ["RANK"] == os.environ.get("TOLD") and self.state.global_step == 3:
        self.stop.ask()
    return theirs(self, *args)

AdapterTrainer.training_step = training_step
from medtrain.cli import main
main()
"""


def test_processes_that_run_ahead_stop_at_one_step_and_go_on_exactly(
    ready: Path, tmp_path: Path
) -> None:
    """As on GPUs: one is told in step 4, and all hear of it two steps later."""
    undisturbed, told = (copied(ready, tmp_path / name, without="sft") for name in ("un", "told"))
    (tmp_path / "child.py").write_text(_AHEAD)
    options = ("sft.optimizer=adamw_torch_fused", "sft.log_every=10", "sft.evals_per_epoch=0")

    def launched(run: Run, **environment: str) -> subprocess.CompletedProcess[str]:
        return torchrun(tmp_path / "child.py", *command(run, "sft", *options)[2:], **environment)

    result = launched(undisturbed)
    assert result.returncode == 0, result.stderr
    result = launched(told, TOLD="1")
    assert result.returncode != 0
    assert "at step 6 of 10" in " ".join(result.stderr.split())
    result = launched(told)
    assert result.returncode == 0, result.stderr
    assert learnt(told, "sft") == learnt(undisturbed, "sft")
    assert weights(told, "sft") == weights(undisturbed, "sft")


def test_each_process_draws_its_own_dropout_again(ready: Path, tmp_path: Path) -> None:
    undisturbed, disturbed = (
        copied(ready, tmp_path / name, without="sft") for name in ("undisturbed", "disturbed")
    )
    for run in (undisturbed, disturbed):
        text = run.config.read_text()
        run.config.write_text(text.replace("dropout: 0.0", "dropout: 0.1"))
    assert train(undisturbed, "sft", *both("ddp")).returncode == 0
    assert disturb(disturbed, "sft", "ddp", signal.SIGTERM, 3) == 75
    assert train(disturbed, "sft", *both("ddp")).returncode == 0
    assert learnt(disturbed, "sft") == learnt(undisturbed, "sft")
    assert weights(disturbed, "sft") == weights(undisturbed, "sft")


def test_one_process_goes_on_with_what_two_began_or_says_why_not(
    ready: Path, tmp_path: Path
) -> None:
    run = copied(ready, tmp_path, without="sft")
    assert disturb(run, "sft", "ddp", signal.SIGUSR1, 3) == 75
    saved = sorted(path.name for path in run.checkpoints("sft").iterdir())

    one = ("train.processes=1", "train.strategy=ddp")
    fewer_rows = train(run, "sft", *one)
    assert fewer_rows.returncode == 64
    assert "4 rows a step by 2 processes; 1 process would make 2, which" in " ".join(
        fewer_rows.stderr.split()
    )
    sharded = train(run, "sft", *both("zero2"))
    assert sharded.returncode == 64
    assert "cannot read their optimiser state" in " ".join(sharded.stderr.split())
    assert sorted(path.name for path in run.checkpoints("sft").iterdir()) == saved

    result = train(run, "sft", *one, "sft.gradient_accumulation=2")
    assert result.returncode == 0, result.stderr
    assert "event=processes_changed" in run.log.read_text()
    steps = [line["step"] for line in learnt(run, "sft") if line["kind"] == "train"]
    assert steps == list(range(1, 11))


def test_a_checkpoint_names_who_wrote_it(ready: Path, tmp_path: Path) -> None:
    run = copied(ready, tmp_path, without="dpo")
    result = train(run, "dpo", *both("zero2"), "dpo.max_steps=2")
    assert result.returncode == 0, result.stderr
    manifest = read_json(run.checkpoints("dpo") / "checkpoint-2" / "complete.json")
    assert manifest["plan"]["processes"] == 2
    assert manifest["plan"]["strategy"] == "zero2"
    assert any("zero_pp_rank_1" in name for name in manifest["files"])


@pytest.mark.parametrize("tied", [True, False])
def test_zero3_trains_new_tokens_of_an_embedding_that_it_would_shard(
    base_dir: Path, tmp_path: Path, tied: bool
) -> None:
    """Weights below 100,000 numbers DeepSpeed leaves whole anyway."""
    base = other_base(base_dir, tmp_path / "base", hidden_size=256, tie_word_embeddings=tied)
    small = write_config(tmp_path, base)
    result = medtrain("run", small, "--until", "sft", *both("zero3"), "sft.max_steps=4",
                      OMP_NUM_THREADS="1")  # fmt: skip
    assert result.returncode == 0, result.stderr
    (root,) = (tmp_path / "runs").iterdir()
    assert losses(Run(root), "sft")[-1] < losses(Run(root), "sft")[0]


def test_in_bfloat16_deepspeed_leaves_the_adapter_in_float32(ready: Path, tmp_path: Path) -> None:
    run = copied(ready, tmp_path, without="sft")
    result = train(run, "sft", *both("zero3"), "model.dtype=bfloat16", "sft.max_steps=4")
    assert result.returncode == 0, result.stderr
    assert {w.dtype for w in load_file(run.adapter("sft") / WEIGHTS_FILE).values()} == {
        torch.float32
    }
    expected = losses(Run(ready), "sft")[:2]
    assert losses(run, "sft")[:2] == pytest.approx(expected, rel=1e-2)
