"""The board against a real Slurm: what it asks is understood there, and its answers here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from medtrain.cluster import board as board_module
from medtrain.cluster.board import Board
from medtrain.cluster.ledger import Submission
from medtrain.cluster.slurm import Slurm, SlurmUnreachableError
from medtrain.status import RunStatus, StageStatus
from tests.cluster.scene import Scene
from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.slurm

NAME = "test-watch"
SOON = 300.0


@pytest.fixture
def scene(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    """A run whose jobs are real; every look asks the accounts, too."""
    monkeypatch.setattr(board_module, "HISTORY_EVERY_S", 0.0)
    monkeypatch.setattr(board_module, "_SILENT_PAUSE_S", 0.0)
    with monkeypatch.context() as without_scripts:
        return Scene(tmp_path, without_scripts)


@pytest.fixture(autouse=True)
def no_job_left(cluster: Cluster) -> object:
    yield
    cluster.cancel_all(NAME)


def sbatch(cluster: Cluster, scene: Scene, script: str, *options: str) -> str:
    where = (f"--chdir={scene.run.root}", "--output=/dev/null", "-pcpu", "-t5", "--mem=50")
    return cluster.run("sbatch", "--parsable", f"-J{NAME}", *where, *options, "--wrap", script)


def note(scene: Scene, intent: Submission, job_id: str) -> None:
    scene.ledger.note(intent, [job_id], [0])


def stage(status: RunStatus, name: str) -> StageStatus:
    return next(s for s in status.stages if s.name == name)


def look_until(
    cluster: Cluster, board: Board, wanted: Callable[[RunStatus], bool], what: str
) -> RunStatus:
    """The first look that is as wanted."""

    def look() -> RunStatus | None:
        status = board.look()
        return status if wanted(status) else None

    found = cluster.wait_until(look, SOON, what)
    assert found is not None
    return found


def test_an_array_runs_as_far_as_it_may_and_the_rest_is_told_why(
    cluster: Cluster, scene: Scene
) -> None:
    scene.finish_until("merge-sft")
    scene.start("generate")
    scene.compute("generate", "candidates", [])
    intent = scene.submitted("generate.candidates", ["generate"], tasks=4)
    job = sbatch(cluster, scene, "sleep 900", "--array=0-3%2", f"--comment={intent.comment}")
    note(scene, intent, job)
    board = Board(scene.run, scene.config)

    def two_run(status: RunStatus) -> bool:
        shards = stage(status, "generate").shards
        return shards is not None and (shards.running, shards.waiting) == (2, 2)

    status = look_until(cluster, board, two_run, "two tasks run and two wait")
    generate = stage(status, "generate")
    assert generate.state == "running"
    assert generate.jobs is not None
    assert generate.jobs.reason == "JobArrayTaskLimit"
    assert "cluster.parallelism" in generate.jobs.sentence


def test_a_job_is_adopted_by_its_comment(cluster: Cluster, scene: Scene) -> None:
    scene.finish_until("prepare")
    intent = scene.submitted("sft", ["sft"])
    job = sbatch(cluster, scene, "sleep 900", f"--comment={intent.comment}")
    board = Board(scene.run, scene.config)
    status = look_until(cluster, board, lambda s: stage(s, "sft").state == "running", "it runs")
    jobs = stage(status, "sft").jobs
    assert jobs is not None
    assert jobs.ids == (job,)


def test_a_requeued_job_is_counted_with_what_it_cost(cluster: Cluster, scene: Scene) -> None:
    scene.finish_until("prepare")
    scene.start("sft")
    intent = scene.submitted("sft", ["sft"], gpus=4)
    job = sbatch(cluster, scene, "sleep $((SLURM_RESTART_COUNT ? 2 : 60))", "--requeue")
    note(scene, intent, job)
    board = Board(scene.run, scene.config)
    look_until(cluster, board, lambda s: stage(s, "sft").state == "running", "it runs")
    cluster.run("scontrol", "requeue", job)

    def came_back(status: RunStatus) -> bool:
        jobs = stage(status, "sft").jobs
        return jobs is not None and jobs.requeues == 1 and not status.alive

    status = look_until(cluster, board, came_back, "it ran again and ended")
    if cluster.has_sacct():
        history = Slurm().history([job])
        assert history is not None
        assert [one.state for one in history] == ["REQUEUED", "COMPLETED"]
        assert stage(status, "sft").gpu is not None
    else:
        assert Slurm().history([job]) is None


def test_a_failed_job_and_its_cancelled_dependent_ask_for_resume(
    cluster: Cluster, scene: Scene
) -> None:
    scene.finish_until("prepare")
    scene.start("sft")
    first = scene.submitted("sft", ["sft"])
    then = scene.submitted("merge-sft", ["merge-sft"])
    job = sbatch(cluster, scene, "exit 65")
    dependent = sbatch(cluster, scene, "true", f"-dafterok:{job}", "--kill-on-invalid-dep=yes")
    note(scene, first, job)
    note(scene, then, dependent)
    board = Board(scene.run, scene.config)
    status = look_until(cluster, board, lambda s: not s.alive, "both are over")
    assert stage(status, "sft").state == "failed"
    assert stage(status, "merge-sft").state == "missing"
    assert "exit code 65" in status.advice.problems[0].message
    assert status.next_command == f"medtrain resume {scene.run.root}"


def test_slurm_may_be_away_for_a_while(cluster: Cluster, scene: Scene) -> None:
    scene.finish_until("prepare")
    intent = scene.submitted("sft", ["sft"])
    with cluster.exclusive():
        note(scene, intent, sbatch(cluster, scene, "sleep 900"))
        board = Board(scene.run, scene.config, Slurm(timeout_s=3))
        look_until(cluster, board, lambda s: stage(s, "sft").state == "running", "it runs")
        cluster.stop_controller()
        away = board.look()
        assert away.slurm == "silent"
        assert stage(away, "sft").state == "running"
        with pytest.raises(SlurmUnreachableError):
            Slurm(timeout_s=3).queue(["1"])
        cluster.start_controller()
        look_until(cluster, board, lambda s: s.slurm == "answers", "it answers again")
        assert stage(board.look(), "sft").state == "running"


def test_what_is_changed_in_slurm_is_changed(cluster: Cluster, scene: Scene) -> None:
    slurm = Slurm()
    running = sbatch(cluster, scene, "sleep 900")
    waiting = sbatch(cluster, scene, "true", f"-dafterok:{running}")
    slurm.set_dependency(waiting, f"afternotok:{running}")
    assert f"afternotok:{running}" in cluster.run("squeue", "-h", "-j", waiting, "-o", "%E")
    slurm.cancel([running, "4000000"])
    cluster.wait_until(
        lambda: all(task.ended or task.job_id == waiting for task in slurm.queue([running])),
        SOON,
        "it is cancelled",
    )
    assert slurm.max_array_size() > 1


def test_a_folded_array_is_unfolded_whole(cluster: Cluster, scene: Scene) -> None:
    odd = ",".join(str(i) for i in range(1, 400, 3))
    job = sbatch(cluster, scene, "true", "--hold", f"--array={odd}")
    (task,) = Slurm().queue([job])
    assert task.indices == tuple(range(1, 400, 3))
    assert task.reason == "JobHeldUser"
