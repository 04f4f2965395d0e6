"""What squeue and sacct print becomes facts; what they do not answer becomes one error."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medtrain.cluster.queue_state import (
    QUEUE_FIELDS,
    expand_indices,
    explain,
    parse_history,
    parse_queue,
)
from medtrain.cluster.slurm import Slurm, SlurmUnreachableError
from medtrain.errors import MedtrainError, TryAgainError

# Printed by Slurm 22.05.8.
QUEUE = """\
236_0|240|FAILED|NonZeroExitCode|0:01|1:59|node1|2026-11-22T02:46:23|0|768|medtrain:cap4|
236_[10,12,14,16,18,20%2]|236|PENDING|JobArrayTaskLimit|0:00|2:00||N/A|0|0|medtrain:cap4|
237|237|PENDING|Dependency|0:00|2:00||N/A|0|0|medtrain:cap3|
238|238|PENDING|PartitionNodeLimit|0:00|2:00||N/A|0|0|medtrain:cap3|
239_[1,5,9-11]|239|PENDING|JobHeldUser|0:00|2:00||N/A|0|0|medtrain:cap3|
236_4|242|RUNNING|None|0:00|2:00|node1|2026-11-22T02:46:24|0|0|medtrain:cap4|
205|205|RUNNING|None|1-02:03:04|UNLIMITED|node[1-2]|2026-11-22T02:44:46|1|0|(null)|
70_2|70|CANCELLED|None|0:03|1:57|node1|2026-11-22T02:44:46|0|15|medtrain:cap5|
"""
HISTORY = """\
205|205|REQUEUED|0:0|2026-11-22T02:44:39|2026-11-22T02:44:40|1|node1
205|205|RUNNING|0:0|2026-11-22T02:44:46|Unknown|17|node1
237|237|PENDING|0:0|Unknown|Unknown|0|None assigned
238|238|CANCELLED by 0|0:0|None|2026-11-22T02:46:29|0|None assigned
236_0|240|FAILED|3:0|2026-11-22T02:46:23|2026-11-22T02:46:24|1|node1
236_4|242|TIMEOUT|0:9|2026-11-22T02:46:23|2026-11-22T02:48:24|121|node1
239_[1,5,9-11]|239|PENDING|0:0|Unknown|Unknown|0|None assigned
"""


def test_a_line_of_the_queue_is_a_job_a_task_or_the_tasks_that_still_wait() -> None:
    failed, folded, job, *_, held, task, plain, last = parse_queue(QUEUE)
    assert (failed.job_id, failed.index, failed.raw_id) == ("236", 0, "240")
    assert failed.ended
    assert failed.exit_code == 3
    assert folded.indices == (10, 12, 14, 16, 18, 20)
    assert (folded.count, folded.index, folded.waits) == (6, None, True)
    assert (job.index, job.count, job.reason) == (None, 1, "Dependency")
    assert held.indices == (1, 5, 9, 10, 11)
    assert task.runs
    assert task.reason == ""
    assert (plain.elapsed_s, plain.left_s, plain.restarts) == (93_784, None, 1)
    assert plain.comment == ""
    assert (last.raw_id, last.exit_code) == ("70", 128 + 15)


def test_lines_of_another_form_are_left_out() -> None:
    assert parse_queue("slurm_load_jobs: a warning\n\n1|2|3\n") == []
    assert parse_history("sacct: a warning\n") == []


def test_history_tells_every_time_that_a_job_ran() -> None:
    requeued, again, failed, killed = parse_history(HISTORY)
    assert (requeued.state, requeued.ended, requeued.elapsed_s) == ("REQUEUED", True, 1)
    assert (again.job_id, again.ended) == ("205", False)
    assert again.started_at - requeued.started_at == 7
    assert (failed.index, failed.raw_id, failed.exit_code) == (0, "240", 3)
    assert killed.exit_code == 128 + 9


@given(st.sets(st.integers(0, 5000), min_size=1, max_size=60), st.integers(1, 99))
def test_folded_tasks_come_back(indices: set[int], limit: int) -> None:
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    folded = ",".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else f"{r[0]}" for r in runs)
    assert expand_indices(f"{folded}%{limit}") == tuple(sorted(indices))
    rest = "|".join([""] * (len(QUEUE_FIELDS) - 3))
    (task,) = parse_queue(f"7_[{folded}%{limit}]|7|PENDING|{rest}|")
    assert task.count == len(indices)


def test_a_step_between_indices_is_understood() -> None:
    assert expand_indices("0-8:4,20") == (0, 4, 8, 20)


@pytest.mark.parametrize(
    ("reason", "words", "needs_person"),
    [
        ("Priority", "other jobs", False),
        ("Resources", "nodes are free", False),
        ("QOSMaxJobsPerUserLimit", "QOS", False),
        ("AssocGrpGRES", "account", False),
        ("AssocGrpGRESMinutes", "budget", True),
        ("ReqNodeNotAvail, UnavailableNodes:node[1-2]", "down, drained", False),
        ("DependencyNeverSatisfied", "never", True),
        ("PartitionTimeLimit", "cluster.time_min", True),
        ("launch failed requeued held", "scontrol release", True),
        ("SomethingOfTheFuture", "SomethingOfTheFuture", False),
    ],
)
def test_a_reason_is_said_in_plain_words(reason: str, words: str, needs_person: bool) -> None:
    explanation = explain(reason)
    assert words in explanation.sentence
    assert explanation.needs_person is needs_person


def command(directory: Path, name: str, script: str) -> None:
    path = directory / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def bin_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only directory of the PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def test_a_machine_without_slurm_says_so(bin_dir: Path) -> None:
    assert not Slurm().is_available()
    assert Slurm().history(["1"]) is None
    with pytest.raises(SlurmUnreachableError, match="squeue cannot be run"):
        Slurm().queue(["1"])


def test_no_answer_is_an_error_that_time_will_mend(bin_dir: Path) -> None:
    command(bin_dir, "squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(TryAgainError, match="Unable to contact"):
        Slurm().queue(["1"])


def test_an_answer_that_does_not_come_is_not_waited_for(bin_dir: Path) -> None:
    command(bin_dir, "squeue", "while :; do :; done")
    with pytest.raises(SlurmUnreachableError, match="has not answered"):
        Slurm(timeout_s=0.2).queue(["1"])


def test_jobs_that_slurm_has_forgotten_are_not_in_the_queue(bin_dir: Path) -> None:
    command(bin_dir, "squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert Slurm().queue(["1"]) == []


def test_nothing_is_asked_about_no_job(bin_dir: Path) -> None:
    assert Slurm().queue([]) == []


def test_one_call_for_any_number_of_jobs_with_nothing_folded_away(
    bin_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SQUEUE_ARRAY", "1")
    show = 'echo "$@ bits=$SLURM_BITSTR_LEN array=$SQUEUE_ARRAY"'
    command(bin_dir, "squeue", f"{show} >> {bin_dir}/said")
    Slurm().queue(str(i) for i in range(1000))
    (said,) = (bin_dir / "said").read_text().splitlines()
    assert "--jobs=0,1," in said
    # Nothing cut off after 64 characters, and no line for each task because a user likes it so.
    assert said.endswith("bits=0 array=")


def test_jobs_are_found_by_their_comment(bin_dir: Path) -> None:
    (bin_dir / "text").write_text(QUEUE)
    command(bin_dir, "squeue", f"/bin/cat {bin_dir}/text")
    found = Slurm().queue_by_comment("medtrain:cap3")
    assert [task.job_id for task in found] == ["237", "238", "239"]


def test_without_accounts_history_is_none_and_is_not_asked_for_again(bin_dir: Path) -> None:
    command(
        bin_dir,
        "sacct",
        f"echo x >> {bin_dir}/calls; echo 'Slurm accounting storage is disabled' >&2; exit 1",
    )
    slurm = Slurm()
    assert slurm.history(["1"]) is None
    assert slurm.history(["1"]) is None
    assert (bin_dir / "calls").read_text() == "x\n"


def test_cancelling_what_is_over_is_no_error(bin_dir: Path) -> None:
    command(bin_dir, "scancel", "echo 'scancel: error: Invalid job id 9' >&2; exit 1")
    Slurm().cancel(["9"])


def test_a_job_that_has_begun_cannot_be_made_to_wait(bin_dir: Path) -> None:
    command(bin_dir, "scontrol", "echo '204_0-29: Job has already finished' >&2; exit 1")
    with pytest.raises(MedtrainError, match="does not wait any more") as caught:
        Slurm().set_dependency("204", "afterany:9")
    assert not isinstance(caught.value, SlurmUnreachableError)


def test_the_limit_of_arrays_is_asked_for_once(bin_dir: Path) -> None:
    command(bin_dir, "scontrol", f"echo x >> {bin_dir}/calls; echo 'MaxArraySize   = 4001'")
    slurm = Slurm()
    assert slurm.max_array_size() == slurm.max_array_size() == 4001
    assert (bin_dir / "calls").read_text() == "x\n"
