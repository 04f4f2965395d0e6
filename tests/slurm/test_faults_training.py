"""A training stage of a chain that cannot go on: its own exit code, and what to do about it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.slurm.chain import Chain, write_config
from tests.slurm.cluster import Cluster
from tests.small_run import write_config as write_small_config

pytestmark = pytest.mark.slurm
HELD = {"sft": {"sbatch": {"hold": True}}}
JOBS = {"gpus": 0, "cpus": 1, "mem_gb": 1.5, "time_min": 30, "look_again_s": 0, "stages": HELD}


@pytest.fixture
def prepared(tmp_path: Path, base_dir: Path, cluster: Cluster) -> Iterator[Chain]:
    """A small run whose data are prepared; its training is held until it is released."""
    secrets = tmp_path / "secrets"
    secrets.touch(mode=0o600)
    path = write_small_config(tmp_path, base_dir)
    tree = yaml.safe_load(path.read_text())
    name = f"trained-{uuid.uuid4().hex[:8]}"
    jobs = {**JOBS, "secrets_file": str(secrets)}
    chain = Chain(write_config(path, {**tree, "name": name, "cluster": jobs}), cluster)
    chain.medtrain("run", chain.config, "--until", "prepare")
    yield chain
    cluster.cancel_all(name)


def test_a_training_that_fails_ends_the_chain_with_its_exit_code_until_it_is_mended(
    prepared: Chain, tmp_path: Path
) -> None:
    chain, secrets, rows = prepared, tmp_path / "secrets", prepared.run.train_rows
    chain.submit()

    secrets.chmod(0o644)
    assert chain_ends_with(chain) == 64
    said = what_to_do(chain)
    assert "secrets" in said["message"]
    assert "chmod 600" in said["fix"]

    secrets.chmod(0o600)
    chain.type(said["command"])
    before = rows.read_bytes()
    rows.write_bytes(before[:-10])
    assert chain_ends_with(chain) == 65
    said = what_to_do(chain)
    assert "data/train.jsonl was changed" in said["message"]

    rows.write_bytes(before)
    chain.type(said["command"])
    release(chain)
    chain.wait_until(lambda: chain.is_done("sft"), "the training is done")


def release(chain: Chain) -> None:
    chain.cluster.run("scontrol", "release", chain.job("sft"))


def chain_ends_with(chain: Chain) -> int:
    """Let the training start; the exit code of its job, once the jobs behind it are gone."""
    release(chain)
    chain.wait_ended()
    shown = chain.cluster.run("scontrol", "--oneliner", "show", "job", chain.job("sft"))
    return int(shown.partition(" ExitCode=")[2].partition(":")[0])


def what_to_do(chain: Chain) -> dict[str, str]:
    """What `status` says of the failed training: message, fix, and the next command."""
    status = chain.status()
    assert status["needs_person"]
    (problem,) = status["problems"]
    assert problem["stage"] == "sft"
    assert status["next_command"].startswith("medtrain resume ")
    return {**problem, "command": status["next_command"]}
