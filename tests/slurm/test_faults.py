"""What goes wrong with tasks and files of an array: every row comes out, once, by itself.

The judge is a server of the test: it holds a row back, so that its task stands in the middle of its
shard for as long as the test needs, and counts how often each row was asked for.
"""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.chain import ARRAY, CLOSE, Chain, ready_to_judge, undisturbed
from tests.slurm.cluster import Cluster
from tests.slurm.judge_server import JudgeServer, judge_server

pytestmark = pytest.mark.slurm
ROWS = 24
EACH_ONCE = Counter({f"q{n}": 1 for n in range(ROWS)})
MIDDLE = "q12"


@pytest.fixture(scope="module")
def expected(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed run collects."""
    directory = tmp_path_factory.mktemp("undisturbed")
    with judge_server() as server:
        return undisturbed(directory, cluster, rows=ROWS, judge=server.settings())


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with judge_server() as server:
        yield server


def chain_of(tmp_path: Path, cluster: Cluster, server: JudgeServer, **resources) -> Chain:
    settings = server.settings(num_shards=3)
    return ready_to_judge(tmp_path, cluster, rows=ROWS, judge=settings, resources=resources)


def test_a_task_that_is_killed_while_it_writes_is_repaired(tmp_path, cluster, server, expected):
    chain = chain_of(tmp_path, cluster, server)
    server.hold([MIDDLE])
    chain.submit()
    process = server.clients(1)[MIDDLE]
    os.kill(process, signal.SIGSTOP)
    torn_line(chain)
    os.kill(process, signal.SIGKILL)
    server.release()
    chain.wait_done()
    assert chain.collected() == expected
    assert server.asked == EACH_ONCE + Counter([MIDDLE])
    assert chain.rounds(ARRAY) == chain.rounds(CLOSE) == 2
    assert len(chain.tasks_submitted(ARRAY, after=1)) == 1


def test_where_nodes_may_not_submit_jobs_status_says_the_command_that_repairs(
    tmp_path, cluster, server, expected
):
    refusal = tmp_path / "bin" / "sbatch"
    refusal.parent.mkdir()
    refusal.write_text("#!/bin/sh\necho 'sbatch: error: not from compute nodes' >&2; exit 1\n")
    refusal.chmod(0o755)
    setup = [f"export PATH={refusal.parent}:$PATH"]
    chain = chain_of(tmp_path, cluster, server, setup=setup)
    server.hold([MIDDLE])
    chain.submit()
    os.kill(server.clients(1)[MIDDLE], signal.SIGKILL)
    server.release()
    chain.wait_ended()
    status = chain.status()
    assert status["needs_person"]
    assert "cannot submit jobs" in status["problems"][0]["message"]
    chain.type(status["next_command"])
    chain.wait_done()
    assert chain.collected() == expected
    assert server.asked == EACH_ONCE + Counter([MIDDLE])


def torn_line(chain: Chain) -> None:
    """A kill in the middle of a write: half a line at the end of the journals that are open."""
    for beat in chain.run.judge.glob("shards/*/*/heartbeat"):
        with (beat.parent / "journal.jsonl").open("ab") as journal:
            journal.write(b'0123abcd {"id":"q12:0-1","request":"')


def test_a_task_told_that_time_is_over_is_queued_again_and_goes_on(
    tmp_path, cluster, server, expected
):
    chain = chain_of(tmp_path, cluster, server)
    server.hold([MIDDLE])
    chain.submit()
    server.clients(1)
    chain.wait_until(lambda: len(running(chain)) == 1, "the others end")
    cluster.run("scancel", "--signal=USR2", *running(chain))
    chain.wait_until(lambda: "queued again" in chain.log_of(ARRAY), "the task has itself requeued")
    server.release()
    chain.wait_done()
    assert chain.collected() == expected
    assert server.asked == EACH_ONCE + Counter([MIDDLE])
    assert chain.rounds(ARRAY) == 1


def running(chain: Chain) -> list[str]:
    """The array tasks that run."""
    array = f"{chain.job(ARRAY)}_"
    jobs = [j for j in chain.queued() if j.job_id.startswith(array) and j.state == "RUNNING"]
    return [job.job_id for job in jobs]


def test_a_higher_partition_takes_the_node(tmp_path, cluster, server, expected):
    where = {"partition": "scavenge", "sbatch": {"nodelist": "node4"}}
    chain = chain_of(tmp_path, cluster, server, stages={"judge": where})
    server.hold(f"q{n}" for n in range(12, ROWS))
    chain.submit()
    held = server.clients(3)
    cluster.run("sbatch", f"--job-name={chain.run.name}-other", "--partition=gpu", "--exclusive",
                "--nodelist=node4", "--output=/dev/null", "--wrap=true")  # fmt: skip
    chain.wait_until(lambda: not running(chain), "the tasks make way")
    server.release()
    chain.wait_done()
    assert chain.collected() == expected
    assert server.asked == EACH_ONCE + Counter(list(held))
    assert chain.rounds(ARRAY) == 1


def test_cancelled_tasks_are_repaired(tmp_path, cluster, server, expected):
    chain = chain_of(tmp_path, cluster, server, parallelism=1)
    server.hold(EACH_ONCE)
    chain.submit()
    held = server.clients(1)
    array = chain.job(ARRAY)
    assert running(chain) == [f"{array}_0"]
    cluster.run("scancel", f"{array}_0", f"{array}_2")
    ((row, process),) = held.items()
    chain.wait_until(lambda: not Path(f"/proc/{process}").exists(), "the task is gone")
    server.release()
    chain.wait_done()
    assert chain.collected() == expected
    assert server.asked == EACH_ONCE + Counter([row])
    assert chain.tasks_submitted(ARRAY, after=1) == [(("verdicts", 0),), (("verdicts", 2),)]


def test_damaged_shard_files_are_made_again_before_they_are_collected(
    tmp_path, cluster, server, expected
):
    judge = server.settings(num_shards=6)
    chain = ready_to_judge(tmp_path, cluster, rows=ROWS, judge=judge)
    server.hold([MIDDLE])
    chain.submit()
    server.clients(1)
    cluster.run("scontrol", "hold", chain.job(CLOSE))
    server.release()
    shards = chain.run.judge / "shards"
    chain.wait_until(lambda: len(list(shards.glob("*/done.json"))) == 6, "all shards are finished")
    rows = {int(path.parts[-3]): path for path in shards.glob("*/*/rows.jsonl")}
    damaged = rows[0].read_bytes()
    rows[0].write_bytes(damaged[:50] + bytes([damaged[50] ^ 1]) + damaged[51:])
    rows[1].write_bytes(rows[1].read_bytes()[:-20])
    rows[2].unlink()
    (shards / "00003/done.json").write_text("{}")
    (shards / "00004/done.json").unlink()
    cluster.run("scontrol", "release", chain.job(CLOSE))
    chain.wait_done()
    assert chain.collected() == expected
    assert server.asked == EACH_ONCE, "the journals hold every row"
    repaired = chain.tasks_submitted(ARRAY, after=1)
    assert sorted(repaired) == [(("verdicts", shard),) for shard in range(5)]


def test_a_row_that_kills_its_process_each_time_is_given_up_and_reported(
    tmp_path, cluster, server, expected
):
    # Eight requests in flight: which of them killed the process is not plain to see.
    settings = server.settings(num_shards=2, concurrency=8, max_failed_fraction=0.1)
    chain = ready_to_judge(tmp_path, cluster, rows=ROWS, judge=settings)
    server.poison.add(MIDDLE)
    chain.submit()
    chain.wait_done()
    lines = chain.collected()["verdicts.jsonl"].splitlines()
    undisturbed_lines = expected["verdicts.jsonl"].splitlines()
    assert [n for n in range(ROWS) if lines[n] != undisturbed_lines[n]] == [12]
    assert b"its process died" in lines[12]
    assert b'"quarantined": true' in lines[12]
    judge = next(stage for stage in chain.status()["stages"] if stage["name"] == "judge")
    assert judge["counts"]["failed"] == 1
    reasons = [json.loads(line)["reason"] for line in chain.run.dropped_pairs.open()]
    assert reasons.count("failed") == 1
