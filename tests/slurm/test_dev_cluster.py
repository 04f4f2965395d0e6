"""The development cluster does what a test, or a person at home, will ask of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import SCRIPT, Cluster

pytestmark = pytest.mark.slurm

NAME = "test-dev-cluster"
COUNT_RUNS = 'echo "run ${SLURM_RESTART_COUNT:-0} on $SLURMD_NODENAME" >> runs.txt'


@pytest.fixture(autouse=True)
def no_job_left(cluster: Cluster) -> Iterator[None]:
    yield
    cluster.cancel_all(NAME)


def sbatch(cluster: Cluster, directory: Path, script: str, *options: str) -> str:
    """Submits a script that runs in `directory`, and gives the job's id."""
    where = (f"--chdir={directory}", f"--output={directory}/log", "--open-mode=append")
    return cluster.run("sbatch", "--parsable", f"-J{NAME}", *where, *options, "--wrap", script)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_up_twice_starts_nothing_twice(cluster: Cluster) -> None:
    def daemons() -> list[str]:
        return re.findall(r"^\w+ runs, pid \d+$", cluster.run(str(SCRIPT), "status"), re.M)

    before = daemons()
    cluster.run(str(SCRIPT), "up")

    assert daemons() == before
    assert {line.split()[0] for line in before} >= {*cluster.nodes, "slurmctld", "munged"}


def test_a_job_runs_on_two_nodes(cluster: Cluster) -> None:
    printed = cluster.run("srun", f"-J{NAME}", "-N2", "printenv", "SLURMD_NODENAME")

    assert len(set(printed.split()) & set(cluster.nodes)) == 2


def test_a_job_sees_the_gpus_it_asked_for_and_no_others(cluster: Cluster) -> None:
    show = "echo gpus=$CUDA_VISIBLE_DEVICES"

    def gpus(*options: str) -> str:
        return cluster.run("srun", f"-J{NAME}", "-n1", *options, "bash", "-c", show)

    assert gpus("--gpus=2") == "gpus=0,1"
    assert gpus("--gpus=1") in {"gpus=0", "gpus=1"}
    assert gpus() == "gpus="


def test_an_array_of_many_short_tasks_finishes_soon(cluster: Cluster, tmp_path: Path) -> None:
    sbatch(cluster, tmp_path, "touch $SLURM_ARRAY_TASK_ID", "--array=0-59", "-pcpu")

    cluster.wait_until(lambda: not cluster.squeue(NAME), 60, "60 tasks done")
    assert {path.name for path in tmp_path.iterdir()} >= {str(index) for index in range(60)}


def test_an_array_index_above_the_limit_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="Invalid job array"):
        sbatch(cluster, tmp_path, "true", "--array=0-1001")


def test_a_preempted_job_hears_its_signal_and_comes_back(cluster: Cluster, tmp_path: Path) -> None:
    everything = ("-wnode4", "--exclusive", "--mem=0")
    script = f"{COUNT_RUNS}; trap 'echo USR2 >> runs.txt' USR2; while true; do sleep 0.1; done"
    with cluster.exclusive():
        victim = sbatch(
            cluster, tmp_path, script, "-pscavenge", *everything, "--signal=B:USR2@60", "-t20"
        )
        cluster.wait_until(lambda: lines(tmp_path / "runs.txt"), 20, "the victim runs")
        sbatch(cluster, tmp_path, "true", "-pgpu", *everything)

        cluster.wait_until(
            lambda: "run 1 on node4" in lines(tmp_path / "runs.txt"), 60, f"{victim} runs again"
        )
        assert lines(tmp_path / "runs.txt") == ["run 0 on node4", "USR2", "run 1 on node4"]


@pytest.mark.parametrize("noticed", [True, False])
def test_the_job_of_a_crashed_node_runs_again(
    cluster: Cluster, tmp_path: Path, noticed: bool
) -> None:
    script = f"{COUNT_RUNS}; test ${{SLURM_RESTART_COUNT:-0}} = 1 || sleep 600"
    with cluster.exclusive():
        job = sbatch(cluster, tmp_path, script, "-wnode3", "--requeue")
        cluster.wait_until(lambda: lines(tmp_path / "runs.txt"), 20, "the job runs")
        cluster.crash("node3", noticed=noticed)
        cluster.boot("node3")

        cluster.wait_until(lambda: not cluster.squeue(NAME), 60, f"{job} ran again")
        assert lines(tmp_path / "runs.txt") == ["run 0 on node3", "run 1 on node3"]


def test_jobs_outlive_the_controller(cluster: Cluster, tmp_path: Path) -> None:
    with cluster.exclusive():
        sbatch(cluster, tmp_path, "until [ -e go ]; do sleep 0.1; done; echo done >> runs.txt")
        cluster.wait_until(
            lambda: [job.state for job in cluster.squeue(NAME)] == ["RUNNING"], 20, "the job runs"
        )
        cluster.stop_controller()
        (tmp_path / "go").touch()
        cluster.wait_until(lambda: lines(tmp_path / "runs.txt") == ["done"], 20, "the job is done")
        cluster.start_controller()

        cluster.wait_until(lambda: not cluster.squeue(NAME), 60, "the controller knows")


def test_what_a_test_broke_is_healed(cluster: Cluster) -> None:
    with cluster.exclusive():
        cluster.crash("node1")
        cluster.crash("node2", noticed=False)

    cluster.run(str(SCRIPT), "status")
    states = cluster.run("sinfo", "-h", "-N", "-p", "gpu", "-o", "%T").split()
    assert not {state for state in states if "down" in state or "*" in state}


def test_sacct_remembers_a_finished_job(cluster: Cluster, tmp_path: Path) -> None:
    if not cluster.has_sacct():
        pytest.skip("this cluster is up without accounts")
    job = sbatch(cluster, tmp_path, "exit 3")

    def account() -> str:
        return cluster.run("sacct", "-X", "-n", "-P", "-j", job, "-o", "State,ExitCode")

    cluster.wait_until(lambda: account() == "FAILED|3:0", 30, "sacct knows how the job ended")
