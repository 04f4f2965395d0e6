"""A training on two nodes that is preempted twice and loses a node: the weights do not show it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from medtrain.lineage import Lineage
from medtrain.run import Run
from tests.slurm.cluster import PATIENCE_S, Cluster
from tests.small_run import medtrain, write_config

pytestmark = pytest.mark.slurm
TRAIN = Path(__file__).parents[2] / "slurm" / "train.sbatch"
STEPS = 90
NODES = ("node3", "node4")
WEIGHTS = "adapter_model.safetensors"


class Training:
    """A run whose SFT is a job on two nodes."""

    def __init__(self, run: Run, cluster: Cluster, name: str) -> None:
        self.run, self.cluster, self.name = run, cluster, name
        self.logs = run.root.parent / f"{name}.logs"
        self.logs.mkdir()
        self.job = ""

    def submit(self, *options: str) -> None:
        environment = {**self.cluster.environment(), "MEDTRAIN_PYTHON": sys.executable,
                       "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # fmt: skip
        done = subprocess.run(
            ["sbatch", "--parsable", f"--job-name={self.name}", "--nodes=2", "--mem=1500",
             "--cpus-per-task=1", "--gpus-per-node=0", "--time=30", *options, str(TRAIN), "sft",
             str(self.run.config)],
            env=environment, cwd=self.logs, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        self.job = done.stdout.strip()

    def state(self) -> str:
        """Of the job in the queue; empty when it has ended."""
        return self.cluster.run("squeue", "-h", "-j", self.job, "-o", "%T") if self._known() else ""

    def _known(self) -> bool:
        return any(job.job_id == self.job for job in self.cluster.squeue(self.name))

    def wait_step(self, step: int) -> None:
        self.cluster.wait_until(
            lambda: self.step() >= step or not self._known(), PATIENCE_S, self.said()
        )
        assert self._known(), f"the job ended at step {self.step()}:\n{self.said()}"

    def wait_state(self, *states: str) -> None:
        self.cluster.wait_until(
            lambda: self.state() in states, PATIENCE_S, f"{states}\n{self.said()}"
        )

    def wait_done(self) -> None:
        self.cluster.wait_until(lambda: not self._known(), PATIENCE_S, self.said())
        assert Lineage(self.run).receipt("sft") is not None, self.said()

    def step(self) -> int:
        file = self.run.metrics("sft")
        lines = file.read_text().splitlines() if file.exists() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)

    def said(self) -> str:
        logs = [*self.logs.glob("*.log"), *self.run.logs.glob("*")]
        return "\n".join(f"--- {log}\n{log.read_text()[-3000:]}" for log in logs)

    def weights(self) -> bytes:
        return (self.run.adapter("sft") / WEIGHTS).read_bytes()

    def begun_at(self, resumed: int) -> int:
        """The step at which it began, or went on for the time that is meant, once it has."""
        if not resumed:
            return 0
        self.cluster.wait_until(
            lambda: len(self.resumed_at()) == resumed, PATIENCE_S, f"resumed\n{self.said()}"
        )
        return self.resumed_at()[-1]

    def resumed_at(self) -> list[int]:
        """The steps from which it went on."""
        lines = self.run.log.read_text().splitlines()
        found = [line for line in lines if "event=resume" in line]
        return [int(line.split(" step=")[1].split()[0]) for line in found]


@pytest.fixture
def trainings(tmp_path: Path, base_dir: Path, cluster: Cluster) -> Iterator[dict[str, Training]]:
    """Two copies of one prepared run."""
    path = write_config(tmp_path, base_dir)
    tree = yaml.safe_load(path.read_text())
    name = f"nodes-{uuid.uuid4().hex[:8]}"
    tree["name"] = f"{name}-undisturbed"
    tree["sft"] |= {"max_steps": STEPS, "checkpoint_steps": 10, "batch_size": 2,
                    "evals_per_epoch": 0.2, "lora": {"r": 4, "dropout": 0.1}}  # fmt: skip
    tree["train"] = {"strategy": "zero3"}
    path.write_text(yaml.safe_dump(tree))
    done = medtrain("run", path, "--until", "prepare")
    assert done.returncode == 0, done.stderr
    first = Run(Path(tree["output_dir"]) / tree["name"])
    second = Run(shutil.copytree(first.root, first.root.with_name(f"{name}-disturbed")))
    yield {run.name.rpartition("-")[2]: Training(run, cluster, run.name) for run in (first, second)}
    cluster.cancel_all(name)


def test_preempted_twice_and_once_killed_with_its_node(
    trainings: dict[str, Training], cluster: Cluster
) -> None:
    undisturbed, disturbed = trainings["undisturbed"], trainings["disturbed"]
    undisturbed.submit()
    undisturbed.wait_done()

    with cluster.exclusive():
        disturbed.submit("--partition=scavenge", f"--nodelist={','.join(NODES)}")
        for already in (0, 1):
            disturbed.wait_step(disturbed.begun_at(already) + 12)
            preempt(disturbed, cluster)
        # Beyond a checkpoint that was written since.
        disturbed.wait_step(disturbed.begun_at(2) // 10 * 10 + 15)
        cluster.crash(NODES[1])
        disturbed.wait_state("PENDING", "CONFIGURING")
        cluster.boot(NODES[1])
        disturbed.wait_done()

    resumed = disturbed.resumed_at()
    assert len(resumed) == 3
    assert resumed == sorted(resumed)
    assert resumed[2] % 10 == 0, "killed with its node, it goes on from a checkpoint"
    assert disturbed.weights() == undisturbed.weights()
    receipt = Lineage(disturbed.run).receipt("sft")
    assert receipt is not None
    assert receipt["counts"]["steps"] == STEPS


def preempt(training: Training, cluster: Cluster) -> None:
    """Take the nodes away, and give them back once the training has left."""
    name = f"{training.name}-other"
    cluster.run("sbatch", f"--job-name={name}", "--partition=gpu", "--exclusive", "--nodes=2",
                f"--nodelist={','.join(NODES)}", "--time=5", "--output=/dev/null",
                "--wrap=sleep 300")  # fmt: skip
    training.wait_state("PENDING")
    cluster.run("scancel", f"--name={name}")
