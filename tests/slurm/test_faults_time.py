"""What takes time away from a shard: the time limit, and a node that goes dark."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.chain import ARRAY, CLOSE, ready_to_judge, undisturbed
from tests.slurm.cluster import Cluster
from tests.slurm.judge_server import JudgeServer, judge_server

pytestmark = pytest.mark.slurm
ROWS = 24
EACH_ONCE = Counter({f"q{n}": 1 for n in range(ROWS)})


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


def test_a_node_that_loses_power_costs_the_rows_in_flight(tmp_path, cluster, server, expected):
    chain = ready_to_judge(tmp_path, cluster, rows=ROWS, judge=server.settings(num_shards=3))
    server.hold(f"q{n}" for n in range(12, ROWS))
    with cluster.exclusive():
        chain.submit()
        held = server.clients(3)
        nodes = {job.nodes for job in chain.queued() if job.state == "RUNNING"}
        for node in nodes:
            cluster.crash(node)
        chain.wait_until(
            lambda: not [p for p in held.values() if Path(f"/proc/{p}").exists()], "they are gone"
        )
        server.release()
        chain.wait_done()
    assert chain.collected() == expected
    assert server.asked == EACH_ONCE + Counter(list(held))
    assert chain.rounds(ARRAY) == chain.rounds(CLOSE) == 1, "Slurm ran the tasks again"


def test_a_task_that_reaches_its_time_limit_goes_on_in_another(tmp_path, cluster, server, expected):
    limits = {"signal_delay_s": 60, "stages": {"judge": {"time_min": 2}}}
    judge = server.settings(num_shards=2)
    chain = ready_to_judge(tmp_path, cluster, rows=ROWS, judge=judge, resources=limits)
    server.hold(f"q{n}" for n in range(12, ROWS))
    chain.submit()
    held = server.clients(2)
    chain.wait_until(lambda: chain.log_of(ARRAY).count("queued again") >= 2, "time is over")
    server.release()
    chain.wait_done()
    assert chain.collected() == expected
    before = Counter({row: n for row, n in server.asked.items() if int(row[1:]) < 12})
    assert before == Counter({row: 1 for row in EACH_ONCE if int(row[1:]) < 12})
    # The other task may have been answered just before its own time was over.
    assert any(server.asked[row] >= 2 for row in held)
    assert chain.rounds(ARRAY) == 1
