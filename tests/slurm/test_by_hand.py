"""Chains that people write themselves, with slurm/train.sbatch, slurm/shards.sbatch, collect."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import yaml

from medtrain.lineage import Lineage
from medtrain.run import Run
from tests.slurm.chain import Chain, ready_to_judge, undisturbed
from tests.slurm.cluster import PATIENCE_S, Cluster
from tests.small_run import medtrain, write_config

pytestmark = pytest.mark.slurm
ROOT = Path(__file__).parents[2]
SHARDS, TRAIN = (ROOT / "slurm" / f"{name}.sbatch" for name in ("shards", "train"))
SMALL = ("--cpus-per-task=1", "--gpus-per-node=0", "--time=30")


def sbatch(cluster: Cluster, place: Path, *arguments: str | Path) -> tuple[int, str]:
    """Submit and wait; the exit code of the job, and what it wrote."""
    environment = {**cluster.environment(), "MEDTRAIN_PYTHON": sys.executable,
                   "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    place.mkdir(exist_ok=True)
    done = subprocess.run(
        ["sbatch", "--wait", *SMALL, f"--job-name=byhand-{place.name}", *map(str, arguments)],
        env=environment, cwd=place, capture_output=True, text=True, check=False, timeout=PATIENCE_S,
    )  # fmt: skip
    logs = sorted(place.glob("medtrain-*.log"), key=lambda path: path.stat().st_mtime)
    return done.returncode, done.stdout + done.stderr + "".join(p.read_text() for p in logs)


def verdicts(chain: Chain) -> bytes:
    return chain.run.verdicts.read_bytes()


# Shards


@pytest.fixture(scope="module")
def expected(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    found = undisturbed(tmp_path_factory.mktemp("undisturbed"), cluster)
    return found["verdicts.jsonl"]


def test_an_array_and_its_collect(tmp_path: Path, cluster: Cluster, expected: bytes) -> None:
    chain = ready_to_judge(tmp_path, cluster, judge={"num_shards": 5})
    code, said = sbatch(
        cluster, tmp_path / "logs", "--mem=500", "--array=0-1", SHARDS, "judge", chain.config
    )
    assert code == 0, said
    assert not chain.is_done("judge")
    chain.medtrain("collect", chain.config, "judge")
    assert chain.is_done("judge")
    assert verdicts(chain) == expected
    assert "finished" in chain.medtrain("collect", chain.config, "judge"), "twice does no harm"


def test_collect_names_what_is_missing_and_how_to_get_it(
    tmp_path: Path, cluster: Cluster, expected: bytes
) -> None:
    chain = ready_to_judge(tmp_path, cluster, judge={"num_shards": 5})
    logs = tmp_path / "logs"
    some = ("--mem=500", "--array=1,3", SHARDS, "judge", chain.config)
    assert sbatch(cluster, logs, *some)[0] == 0
    said = chain.medtrain("collect", chain.config, "judge", expect=75)
    assert "3 shards of judge are missing: 0,2,4" in said
    command = re.search(r"sbatch (--array=\S+) slurm/shards.sbatch (.*), and then", said)
    assert command, said
    stage, run = shlex.split(command[2])
    code, said = sbatch(cluster, logs, "--mem=500", command[1], SHARDS, stage, run)
    assert code == 0, said
    chain.medtrain("collect", run, "judge")
    assert verdicts(chain) == expected


def test_an_array_of_more_tasks_than_shards_makes_more_shards(
    tmp_path: Path, cluster: Cluster, expected: bytes
) -> None:
    """Who asks for three tasks wants three to work, whatever number of shards is configured."""
    chain = ready_to_judge(tmp_path, cluster, judge={"num_shards": 1})
    logs = tmp_path / "logs"
    assert sbatch(cluster, logs, "--mem=500", "--array=0-2", SHARDS, "judge", chain.config)[0] == 0
    done = sorted(path.parent.name for path in chain.run.judge.glob("shards/*/done.json"))
    assert done == ["00000", "00001", "00002"]
    (chain.run.judge / "shards" / "00002" / "done.json").unlink()
    said = chain.medtrain("collect", chain.config, "judge", expect=75)
    assert "--array=2 " in said
    assert sbatch(cluster, logs, "--mem=500", "--array=2", SHARDS, "judge", chain.config)[0] == 0
    chain.medtrain("collect", chain.config, "judge")
    assert verdicts(chain) == expected


def test_a_stage_without_shards_and_one_that_is_too_early(tmp_path: Path, cluster: Cluster) -> None:
    chain = ready_to_judge(tmp_path, cluster)
    for stage, code, word in (("sft", 64, "Stages that have"), ("evaluate", 65, "evaluate needs")):
        logs = tmp_path / stage
        found, said = sbatch(cluster, logs, "--mem=500", SHARDS, stage, chain.config)
        assert found == code, said
        assert word in said
    assert chain.medtrain("collect", chain.config, "sft", expect=64)


# Training, and what needs models


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, base_dir: Path) -> Path:
    """A configuration whose run has its data, and evaluates the base alone."""
    path = write_config(tmp_path_factory.mktemp("prepared"), base_dir)
    tree = yaml.safe_load(path.read_text())
    tree["name"] = f"byhand-{uuid.uuid4().hex[:8]}"
    tree["evaluate"] |= {"variants": ["base"], "num_shards": 2, "pairwise": False}
    path.write_text(yaml.safe_dump(tree))
    done = medtrain("run", path, "--until", "prepare")
    assert done.returncode == 0, done.stderr
    return path


def run_of(config: Path) -> Run:
    tree = yaml.safe_load(config.read_text())
    return Run(Path(tree["output_dir"]) / tree["name"])


def test_evaluate_takes_two_rounds(prepared: Path, tmp_path: Path, cluster: Cluster) -> None:
    """The answers, then the verdicts on them; each with an array and a collect."""
    elsewhere = f"output_dir={tmp_path / 'here'}"
    for stage in ("prepare", "evaluate"):
        assert medtrain(stage, prepared, elsewhere).returncode == 0
    for round_ in ("goes on with its next array", "stage_done"):
        array = ("--mem=1500", "--array=0-1", SHARDS, "evaluate", prepared)
        code, said = sbatch(cluster, tmp_path / "logs", *array)
        assert code == 0, said
        collected = medtrain("collect", prepared, "evaluate")
        assert collected.returncode == 0, collected.stderr
        assert round_ in collected.stdout + collected.stderr
    here = Run(tmp_path / "here" / run_of(prepared).name)
    assert run_of(prepared).evaluation_rows.read_bytes() == here.evaluation_rows.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["sft", "sft.batch_size=none"], 64, "sft.batch_size"),
        (["judge"], 64, "no training stage"),
        (["dpo"], 65, "dpo needs"),
    ],
)
def test_the_exit_code_of_a_training_that_cannot_begin(
    arguments: list[str], code: int, word: str, prepared: Path, tmp_path: Path, cluster: Cluster
) -> None:
    stage, *overrides = arguments
    logs = tmp_path / "logs"
    found, said = sbatch(cluster, logs, "--mem=1500", TRAIN, stage, prepared, *overrides)
    assert found == code, said
    assert word in said
    assert "Traceback" not in said


def test_a_script_without_arguments(tmp_path: Path, cluster: Cluster) -> None:
    for script in (TRAIN, SHARDS):
        code, said = sbatch(cluster, tmp_path / script.stem, "--mem=100", script)
        assert code == 64
        assert "usage: sbatch" in said


def test_training_on_two_nodes(prepared: Path, tmp_path: Path, cluster: Cluster) -> None:
    """Both nodes train: a step takes a batch on each, so that an epoch has half the steps."""
    training = ["sft.max_steps=null", "sft.epochs=1", f"output_dir={tmp_path}"]
    assert medtrain("prepare", prepared, *training).returncode == 0
    code, said = sbatch(
        cluster, tmp_path / "logs", "--mem=1500", "--nodes=2", TRAIN, "sft", prepared, *training
    )
    assert code == 0, said
    run = Run(tmp_path / run_of(prepared).name)
    assert (run.adapter("sft") / "adapter_model.safetensors").exists()
    receipt = Lineage(run).receipt("sft")
    assert receipt is not None
    per_step = yaml.safe_load(prepared.read_text())["sft"]["batch_size"] * 2
    assert receipt["counts"]["steps"] == -(-receipt["counts"]["train_rows"] // per_step)
