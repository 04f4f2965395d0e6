"""The board joins files and Slurm; watch shows it until nothing more will happen by itself."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console as RichConsole

from medtrain.cluster import board as board_module
from medtrain.cluster import watch as watch_module
from medtrain.cluster.board import Board, look
from medtrain.cluster.watch import watch_run
from medtrain.console import Console
from medtrain.errors import ConfigError, MedtrainError, StoppedError
from medtrain.shards import Phase, Request, attempt_units, open_phase
from medtrain.status import RunStatus, StageStatus
from tests.cluster.scene import QUIET, Scene, history_line, queue_line


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(tmp_path, monkeypatch)


def stage(status: RunStatus, name: str) -> StageStatus:
    return next(s for s in status.stages if s.name == name)


def drawn(status: RunStatus, width: int) -> str:
    out = io.StringIO()
    RichConsole(file=out, width=width, color_system=None).print(status)
    return out.getvalue()


def generating(scene: Scene) -> None:
    """`generate` is in the middle of its array of four."""
    scene.finish_until("merge-sft")
    scene.submitted("sft", ["sft"], "11", gpus=8)
    scene.submitted("merge-sft", ["merge-sft", "generate"], "12")
    scene.submitted("generate.candidates", ["generate"], "13", gpus=1, tasks=4)
    scene.submitted("generate.candidates.close", ["generate", "judge"], "14")
    scene.submitted("dpo", ["dpo"], "15", gpus=8)
    scene.start("generate")
    scene.compute("generate", "candidates", [0])


GENERATING = (
    queue_line("13_0", "COMPLETED", raw="20")
    + queue_line("13_1", "RUNNING", used="0:30", raw="21")
    + queue_line("13_[2-3%1]", "PENDING", reason="Resources")
    + queue_line("14", "PENDING", reason="Dependency")
    + queue_line("15", "PENDING", reason="Dependency")
)


# The join


def test_files_and_queue_are_one_table(scene: Scene) -> None:
    generating(scene)
    scene.slurm_says(GENERATING)
    status = look(scene.run, scene.config)
    generate = stage(status, "generate")
    assert [s.state for s in status.stages] == [
        "done", "done", "done", "running", "queued", "missing", "missing", "queued", "missing",
        "missing", "missing",
    ]  # fmt: skip
    assert generate.amount is not None
    assert (generate.amount.done, generate.amount.total) == (10, 40)
    shards = generate.shards
    assert shards is not None
    assert (shards.running, shards.waiting, shards.failed, shards.done) == (1, 2, 0, 1)
    assert generate.jobs is not None
    assert generate.jobs.reason == "Resources"
    assert status.alive
    assert status.next_command == f"medtrain watch {scene.run.root}"


def test_one_squeue_and_one_sacct_a_look(scene: Scene) -> None:
    generating(scene)
    scene.slurm_says(GENERATING, history="")
    look(scene.run, scene.config)
    assert sorted(scene.calls()) == ["sacct", "squeue"]


def test_accounts_are_not_asked_at_every_look(scene: Scene) -> None:
    generating(scene)
    scene.slurm_says(GENERATING, history="")
    board = Board(scene.run, scene.config)
    for _ in range(3):
        board.look()
    assert scene.calls().count("sacct") == 1
    assert scene.calls().count("squeue") == 3


def test_a_run_that_was_never_submitted_asks_slurm_nothing(scene: Scene) -> None:
    scene.finish_until("sft")
    scene.slurm_says("")
    status = look(scene.run, scene.config)
    assert scene.calls() == []
    assert status.slurm == "unasked"
    assert status.next_command == f"medtrain run {scene.run.config}"


def test_a_looked_at_file_is_believed_before_a_job(scene: Scene) -> None:
    scene.finish_until("sft")
    scene.submitted("sft", ["sft"], "11")
    scene.slurm_says(queue_line("11", "FAILED", status=1 << 8))
    assert stage(look(scene.run, scene.config), "sft").state == "done"


def test_a_job_is_found_by_its_comment_where_its_submitter_died(scene: Scene) -> None:
    scene.finish_until("prepare")
    intent = scene.submitted("sft", ["sft"])
    scene.slurm_says(
        queue_line("77", "RUNNING", comment=intent.comment)
        + queue_line("78", "RUNNING", comment="medtrain:another")
    )
    found = stage(look(scene.run, scene.config), "sft")
    assert found.state == "running"
    assert found.jobs is not None
    assert found.jobs.ids == ("77",)


def test_an_array_of_one_task_is_no_array_to_slurm(scene: Scene) -> None:
    scene.finish_until("merge-sft")
    scene.start("generate")
    scene.compute("generate", "candidates", [], num_shards=1)
    scene.submitted("generate.candidates", ["generate"], "13", tasks=1)
    scene.slurm_says(queue_line("13", "PENDING", reason="Priority"))
    shards = stage(look(scene.run, scene.config), "generate").shards
    assert shards is not None
    assert (shards.waiting, shards.total) == (1, 1)


def test_a_job_of_two_stages_is_at_the_first_that_is_not_done(scene: Scene) -> None:
    scene.finish_until("sft")
    scene.submitted("merge-sft", ["merge-sft", "generate"], "12")
    scene.slurm_says(queue_line("12", "RUNNING"))
    status = look(scene.run, scene.config)
    assert stage(status, "merge-sft").state == "running"
    assert stage(status, "generate").state == "queued"


def test_a_training_tells_its_steps_and_how_fast_they_go(scene: Scene) -> None:
    scene.finish_until("prepare")
    scene.start("sft")
    scene.submitted("sft", ["sft"], "11")
    scene.slurm_says(queue_line("11", "RUNNING", used="2:00"))

    def said(seconds_ago: float, step: int, task: str = "sft") -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - seconds_ago))
        return f"time={at} event=progress task={task} done={step} total=200 loss=1.5\n"

    scene.run.log.write_text(said(60, 20) + said(45, 3, "judge") + said(0, 80))
    scene.run.metrics("sft").write_text('{"step": 81, "loss": 1.5}\n{"step": 9')
    amount = stage(look(scene.run, scene.config), "sft").amount
    assert amount is not None
    assert (amount.done, amount.total, amount.unit) == (81, 200, "steps")
    assert amount.per_s == pytest.approx(1.0, rel=0.05)
    scene.run.log.write_text(said(3600, 20) + said(3500, 80))
    amount = stage(look(scene.run, scene.config), "sft").amount
    assert amount is not None
    assert amount.per_s is None


# What needs a person


def test_a_failed_job_asks_for_resume_and_tells_why(scene: Scene) -> None:
    scene.finish_until("prepare")
    scene.submitted("sft", ["sft"], "11", gpus=8)
    scene.submitted("merge-sft", ["merge-sft"], "12")
    scene.fail("sft", ConfigError("sft.batch_size is 0", fix="Set it to 1 or more."))
    scene.slurm_says(
        queue_line("11", "FAILED", status=64 << 8) + queue_line("12", "CANCELLED", used="0:00")
    )
    status = look(scene.run, scene.config)
    assert [s.state for s in status.stages[:3]] == ["done", "failed", "missing"]
    assert status.next_command == f"medtrain resume {scene.run.root}"
    assert status.advice.needs_person
    text = drawn(status, 120)
    assert "sft.batch_size is 0" in text
    assert "Set it to 1 or more." in text


def test_a_stop_that_was_asked_for_is_no_failure(scene: Scene) -> None:
    scene.finish_until("prepare")
    scene.fail("sft", StoppedError("sft was asked to stop and has, at step 3 of 10", fix="Again."))
    status = look(scene.run, scene.config)
    assert stage(status, "sft").state == "stopped"
    assert stage(status, "sft").note == ""
    marker = scene.run.checkpoints("sft") / "checkpoint-3" / "complete.json"
    marker.parent.mkdir(parents=True)
    marker.write_text(json.dumps({"step": 3, "plan": {"max_steps": 10}}))
    status = look(scene.run, scene.config)
    assert stage(status, "sft").note == "saved up to step 3"
    assert status.advice.problems == ()
    assert status.advice.happening == "Nothing runs: sft stopped before its end."
    assert status.next_command == f"medtrain run {scene.run.config}"


def test_a_job_that_left_no_word_is_told_by_how_it_ended(scene: Scene) -> None:
    scene.finish_until("prepare")
    scene.submitted("sft", ["sft"], "11")
    scene.start("sft")
    scene.slurm_says(queue_line("11", "OUT_OF_MEMORY"))
    status = look(scene.run, scene.config)
    assert stage(status, "sft").state == "failed"
    assert "OUT_OF_MEMORY" in drawn(status, 120)


def test_what_failed_because_something_before_it_did_is_not_called_failed(scene: Scene) -> None:
    scene.finish_until("prepare")
    scene.fail("sft", ConfigError("sft.batch_size is 0"))
    scene.submitted("sft", ["sft"], "11")
    scene.submitted("evaluate.answers.close", ["evaluate"], "19")
    scene.slurm_says(
        queue_line("11", "FAILED", status=64 << 8) + queue_line("19", "FAILED", status=65 << 8)
    )
    status = look(scene.run, scene.config)
    assert stage(status, "evaluate").state == "missing"
    assert [problem.stage for problem in status.advice.problems] == ["sft"]


def test_an_error_of_a_shard_is_the_error_of_its_stage(scene: Scene) -> None:
    def refuse(batches: Iterable[Sequence[Request]]) -> Iterator[tuple[str, dict[str, Any]]]:
        raise ConfigError("generate.top_p is 2", fix="Set it to 1 or less.")

    scene.finish_until("merge-sft")
    scene.start("generate")
    scene.submitted("generate.candidates", ["generate"], "13", tasks=4)
    phase = Phase("x", (scene.shard_set("generate", "candidates", refuse),))
    open_phase(phase)
    with pytest.raises(ConfigError):
        attempt_units(phase, [("candidates", 2)], QUIET)
    scene.slurm_says(queue_line("13_2", "FAILED", status=64 << 8))
    status = look(scene.run, scene.config)
    generate = stage(status, "generate")
    assert generate.state == "failed"
    assert generate.shards is not None
    assert generate.shards.failed == 1
    assert [p.fix for p in status.advice.problems] == ["Set it to 1 or less."]
    assert "shard 2" in status.advice.problems[0].message


def test_an_old_error_is_not_shown_while_its_stage_is_tried_again(scene: Scene) -> None:
    scene.finish_until("prepare")
    scene.submitted("sft", ["sft"], "11")
    scene.fail("sft", ConfigError("an old error"))
    scene.slurm_says(queue_line("11", "PENDING", reason="Priority"))
    status = look(scene.run, scene.config)
    assert stage(status, "sft").state == "queued"
    assert "an old error" not in drawn(status, 120)


def test_stages_that_were_never_begun_ask_for_submit(scene: Scene) -> None:
    scene.finish_until("prepare")
    scene.submitted("prepare", ["prepare"], "10")
    scene.slurm_says("")
    status = look(scene.run, scene.config)
    assert status.next_command == f"medtrain submit {scene.run.root}"


def test_what_begun_without_a_job_is_stopped_and_not_running(scene: Scene) -> None:
    scene.finish_until("prepare")
    scene.submitted("sft", ["sft"], "11")
    scene.start("sft")
    scene.slurm_says("")
    status = look(scene.run, scene.config)
    assert stage(status, "sft").state == "stopped"
    assert status.next_command == f"medtrain resume {scene.run.root}"


def test_a_local_run_is_running_while_it_holds_its_directory(scene: Scene) -> None:
    scene.finish_until("prepare")
    scene.start("sft")
    with scene.run.lock():
        assert stage(look(scene.run, scene.config), "sft").state == "running"
    assert stage(look(scene.run, scene.config), "sft").state == "stopped"


def test_a_job_that_will_never_start_needs_a_person(scene: Scene) -> None:
    scene.finish_until("prepare")
    scene.submitted("sft", ["sft"], "11")
    scene.slurm_says(queue_line("11", "PENDING", reason="DependencyNeverSatisfied"))
    status = look(scene.run, scene.config)
    assert status.advice.needs_person
    assert status.next_command == f"medtrain resume {scene.run.root}"
    scene.slurm_says(queue_line("11", "PENDING", reason="JobHeldUser"))
    assert look(scene.run, scene.config).next_command == "scontrol release 11"


def test_a_finished_run_points_at_its_report(scene: Scene) -> None:
    scene.finish_until("report")
    status = look(scene.run, scene.config)
    assert status.done
    assert status.next_command == f"open {scene.run.report / 'index.html'}"


# Signs of life


def dying(scene: Scene, monkeypatch: pytest.MonkeyPatch, *, age_s: float) -> None:
    """Shard 1 was begun by job 21 on another machine, and nothing was heard of it since."""

    class Killed(BaseException):
        """What no process can note."""

    def die(batches: Iterable[Sequence[Request]]) -> Iterator[tuple[str, dict[str, Any]]]:
        for batch in batches:
            yield batch[0].id, {"text": "yes"}
        raise Killed

    monkeypatch.setenv("SLURM_JOB_ID", "21")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "1")
    phase = Phase("x", (scene.shard_set("generate", "candidates", die),))
    with pytest.raises(Killed):
        attempt_units(phase, [("candidates", 1)], QUIET)
    (ended,) = scene.run.generate.glob("shards/00001/21.*/ended-*")
    beat = ended.rename(ended.with_name("heartbeat"))
    os.utime(beat, (time.time() - age_s, time.time() - age_s))


def test_a_running_task_without_a_heartbeat_is_told(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    generating(scene)
    dying(scene, monkeypatch, age_s=300)
    scene.slurm_says(GENERATING.replace("RUNNING|None|0:30", "RUNNING|None|10:00"))
    status = look(scene.run, scene.config)
    assert stage(status, "generate").silent == 1
    assert "no sign of life" in drawn(status, 120)


def test_a_task_that_has_just_begun_is_not_called_silent(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    generating(scene)
    dying(scene, monkeypatch, age_s=300)
    scene.slurm_says(GENERATING)
    assert stage(look(scene.run, scene.config), "generate").silent == 0


# GPU-hours


def test_gpu_hours_are_those_of_every_incarnation(scene: Scene) -> None:
    scene.finish_until("sft")
    scene.submitted("sft", ["sft"], "11", gpus=8)
    scene.slurm_says(
        "",
        history_line("11", "TIMEOUT", start=time.time() - 20_000, seconds=3600)
        + history_line("11", "COMPLETED", start=time.time() - 10_000, seconds=1800),
    )
    sft = stage(look(scene.run, scene.config), "sft")
    assert sft.gpu is not None
    assert sft.gpu.spent_s == 8 * (3600 + 1800)
    # No checkpoint tells that the first one came to anything.
    assert sft.gpu.wasted_s == 8 * 3600
    assert sft.jobs is not None
    assert sft.jobs.requeues == 1


def test_a_checkpoint_saves_what_was_before_it(scene: Scene) -> None:
    scene.finish_until("prepare")
    scene.start("sft")
    scene.submitted("sft", ["sft"], "11", gpus=2)
    marker = scene.run.checkpoints("sft") / "checkpoint-30" / "complete.json"
    marker.parent.mkdir(parents=True)
    marker.write_text(json.dumps({"step": 30, "finished": False, "plan": {"max_steps": 120}}))
    began = int(time.time()) - 1000
    scene.slurm_says("", history_line("11", "NODE_FAIL", start=began, seconds=1100))
    sft = stage(look(scene.run, scene.config), "sft")
    assert sft.gpu is not None
    assert sft.gpu.wasted_s == pytest.approx(2 * 100, abs=10)
    assert sft.amount is not None
    assert (sft.amount.done, sft.amount.total, sft.amount.unit) == (30, 120, "steps")


def test_rows_save_what_was_before_them(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    generating(scene)
    dying(scene, monkeypatch, age_s=300)
    scene.slurm_says(
        "", history_line("13_1", "NODE_FAIL", start=int(time.time()) - 60, seconds=3660, raw="21")
    )
    generate = stage(look(scene.run, scene.config), "generate")
    assert generate.gpu is not None
    assert generate.gpu.spent_s == 3660
    assert generate.gpu.wasted_s == pytest.approx(3600, abs=30)


def test_without_accounts_finished_stages_tell_their_own_time(scene: Scene) -> None:
    scene.finish("prepare")
    scene.finish("sft", seconds=3600)
    scene.submitted("sft", ["sft"], "11", gpus=8)
    scene.slurm_says("")
    sft = stage(look(scene.run, scene.config), "sft")
    assert sft.gpu is not None
    assert sft.gpu.spent_s == 8 * 3600


# Slurm does not answer


def test_files_go_on_being_shown_while_slurm_is_silent(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(board_module, "_SILENT_PAUSE_S", 0.0)
    generating(scene)
    scene.slurm_says(GENERATING)
    board = Board(scene.run, scene.config)
    board.look()
    scene.slurm_is_down()
    scene.compute("generate", "candidates", [2])
    silent = board.look()
    assert silent.slurm == "silent"
    assert silent.slurm_silent_since is not None
    generate = stage(silent, "generate")
    assert generate.state == "running"
    assert generate.amount is not None
    assert generate.amount.done == 20
    assert "has not answered since" in drawn(silent, 80)
    assert not silent.advice.needs_person
    scene.slurm_says(GENERATING)
    assert board.look().slurm == "answers"


def test_nobody_is_called_stopped_before_slurm_has_said_anything(scene: Scene) -> None:
    scene.finish_until("prepare")
    scene.submitted("sft", ["sft"], "11")
    scene.start("sft")
    scene.slurm_is_down()
    status = look(scene.run, scene.config)
    assert stage(status, "sft").state == "begun"
    assert status.next_command == f"medtrain watch {scene.run.root}"


def test_a_machine_without_slurm_still_shows_the_files(scene: Scene) -> None:
    generating(scene)
    status = look(scene.run, scene.config)
    assert status.slurm == "absent"
    assert "no Slurm on this machine" in drawn(status, 120)


# Drawing


@pytest.mark.parametrize("width", [80, 120])
def test_no_line_is_wider_than_the_terminal(scene: Scene, width: int) -> None:
    generating(scene)
    scene.slurm_says(GENERATING)
    text = drawn(look(scene.run, scene.config), width)
    assert max(map(len, text.splitlines())) <= width
    assert "next in line" in text
    assert text.index("generate") < text.index("judge")


def test_json_says_the_same(scene: Scene) -> None:
    generating(scene)
    scene.slurm_says(GENERATING)
    tree = json.loads(json.dumps(look(scene.run, scene.config).to_json()))
    generate = next(s for s in tree["stages"] if s["name"] == "generate")
    assert generate["state"] == "running"
    assert generate["progress"]["done"] == 10
    assert generate["shards"] == {"total": 4, "done": 1, "running": 1, "waiting": 2, "failed": 0}
    assert generate["jobs"]["reason"] == "Resources"
    assert tree["next_command"].startswith("medtrain watch")


# Watching


def test_watch_ends_with_the_run(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    scene.finish_until("report")
    assert watch_run(scene.run, scene.config, Console(), every_s=0.01) == 0
    out = capsys.readouterr().out
    assert "event=stage stage=report state=done" in out
    assert "index.html" in out


def test_watch_ends_when_nothing_goes_on(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    scene.finish_until("prepare")
    scene.submitted("sft", ["sft"], "11")
    scene.fail("sft", MedtrainError("the loss is nan"))
    scene.slurm_says(queue_line("11", "FAILED", status=1 << 8))
    assert watch_run(scene.run, scene.config, Console(), every_s=0.01) == 1
    out = capsys.readouterr().out
    assert 'why="the loss is nan"' in out
    assert f'next="medtrain resume {scene.run.root}"' in out
    # What does not change is said once.
    assert out.count("stage=sft") == 1


def test_ctrl_c_ends_the_watch_and_nothing_else(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    generating(scene)
    scene.slurm_says(GENERATING)
    clock = SimpleNamespace(sleep=interrupt, monotonic=time.monotonic, strftime=time.strftime)
    monkeypatch.setattr(watch_module, "time", clock)
    console = Console()
    console.rich = RichConsole(force_terminal=True, width=100)
    console.on_terminal = True
    assert watch_run(scene.run, scene.config, console, every_s=1) == 0
    last = capsys.readouterr().out.rpartition("run small")[2]
    assert "generate runs: 10 of 40 rows" in last
    assert "Ctrl-C" not in last


def test_one_look_is_enough_for_a_script(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    generating(scene)
    scene.slurm_says(GENERATING)
    assert watch_run(scene.run, scene.config, Console(), once=True) == 0
    assert "next: medtrain watch" in capsys.readouterr().out
