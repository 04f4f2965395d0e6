"""The doctor on a real Slurm: what works passes, what does not is told, nothing stays."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from medtrain.cluster.checks.finding import Finding
from medtrain.cluster.checks.probe import probe_options, run_probe
from medtrain.cluster.checks.probe_findings import judge_probe
from medtrain.cluster.doctor import run_doctor
from medtrain.config import RunConfig, parse_config
from medtrain.console import Console
from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.slurm

QUIET = Console(quiet=True)


def config_with(base: str = "builtin:tiny", **cluster: Any) -> RunConfig:
    tree = {
        "name": "small",
        "model": {"base": base},
        "data": {"sources": [{"adapter": "table", "path": "rows.jsonl"}]},
        "judge": {"kind": "rules"},
        "cluster": cluster,
    }
    return parse_config(tree)


def by_check(findings: list[Finding] | tuple[Finding, ...]) -> dict[str, Finding]:
    return {finding.check: finding for finding in findings}


def probe(directory: Path, *, wait_s: float = 60.0, **cluster: Any) -> dict[str, Finding]:
    config = config_with(**cluster)
    partition = {"TotalNodes": "4"}
    result = run_probe(config, partition, directory, QUIET, wait_s=wait_s, paths=[str(directory)])
    return by_check(judge_probe(result, config, directory))


@pytest.fixture(autouse=True)
def nothing_left(cluster: Cluster, tmp_path: Path) -> Iterator[None]:
    yield
    assert list(tmp_path.glob("**/.medtrain-doctor-*")) == []
    assert [job for job in cluster.squeue("medtrain-doctor") if job.state == "PENDING"] == []


def test_a_working_cluster_passes(cluster: Cluster, tmp_path: Path) -> None:
    report = run_doctor(config_with(), QUIET, cluster=True, directory=tmp_path, probe_wait_s=300)
    found = by_check(report.findings)
    assert [f for f in report.findings if f.mark == "fail"] == []
    assert report.exit_code == 0
    for check in ("slurm", "array limits", "requeue", "partition", "probe job", "job python",
                  "job files", "job locks", "job clocks", "job all-reduce", "job sbatch",
                  "job signal"):  # fmt: skip
        assert found[check].mark == "pass", found[check]
    assert found["sacct"].mark == ("pass" if cluster.has_sacct() else "warn")
    assert len(set(found["probe job"].facts["hosts"])) == 2
    assert "between two nodes" in found["job all-reduce"].found
    assert 60 <= found["job signal"].facts["before_limit_s"] <= 180
    assert list(tmp_path.iterdir()) == []


def test_a_partition_that_is_not_there_stops_before_the_probe(
    cluster: Cluster, tmp_path: Path
) -> None:
    config = config_with(partition="gone", account="nobody")
    found = by_check(run_doctor(config, QUIET, cluster=True, directory=tmp_path).findings)
    assert found["partition"].mark == "fail"
    assert "scavenge" in found["partition"].fix
    assert found["probe job"].mark == "skip"
    # Nobody enforces accounts there.
    assert found["account"].mark in ("warn", "skip")


def test_what_sbatch_refuses_is_quoted(cluster: Cluster, tmp_path: Path) -> None:
    found = probe(tmp_path, constraint="no-such-feature")["probe job"]
    assert found.mark == "fail"
    assert "Invalid feature" in found.found


def test_a_job_that_does_not_start_is_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    found = probe(tmp_path, wait_s=1, sbatch={"begin": "now+1hour"})["probe job"]
    assert found.mark == "warn"
    assert "BeginTime" in found.found


def test_an_environment_that_is_not_there_is_quoted(cluster: Cluster, tmp_path: Path) -> None:
    found = probe(tmp_path, activate="source /no/such/venv/bin/activate")["probe job"]
    assert found.mark == "fail"
    assert "/no/such/venv" in found.found
    assert "activate" in found.fix


def test_a_directory_that_only_this_host_has(cluster: Cluster, tmp_path: Path) -> None:
    local = tmp_path / "local"
    local.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", local], check=False)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        node_sees = cluster.run("srun", "-N1", "stat", "-f", "-c", "%T", str(local))
        if node_sees == "tmpfs":
            pytest.skip("the nodes share this machine's mounts")
        found = probe(local)["probe job"]
    finally:
        subprocess.run(["umount", "-l", local], check=True)
    assert found.mark == "fail"
    assert "left no file" in found.found
    assert "shared file system" in found.fix


def test_the_options_for_a_gpu_are_taken(cluster: Cluster) -> None:
    options = probe_options(config_with(base="someone/model", gpus=2))
    assert "--gpus-per-node=1" in options
    cluster.run("sbatch", "--test-only", *options, "--wrap=true")
