"""`--executor local --workers N`: the shards of a stage on several processes of one machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

from tests.slurm.chain import Chain, ready_to_judge
from tests.slurm.cluster import Cluster
from tests.slurm.judge_server import JudgeServer, judge_server
from tests.small_run import medtrain

NO_CLUSTER = cast("Cluster", None)
"""These runs never ask for one."""
WORKERS = ("--executor", "local", "--workers", "2")


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with judge_server() as server:
        yield server


def ready(directory: Path, server: JudgeServer | None = None) -> Chain:
    judge = server.settings() if server else {"orders": "both"}
    return ready_to_judge(directory, NO_CLUSTER, judge={**judge, "num_shards": 4})


def start(chain: Chain, **how: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "medtrain", "run", str(chain.config), *chain.selection]
    return subprocess.Popen(
        [*command, *WORKERS], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, **how
    )  # type: ignore[call-overload,no-any-return]


def wait_until(answer: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not answer():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_same_bytes_as_in_one_process(tmp_path: Path) -> None:
    here, there = ready(tmp_path / "here"), ready(tmp_path / "there")
    here.medtrain("run", here.config, *here.selection)
    there.medtrain("run", there.config, *there.selection, *WORKERS)
    assert there.collected() == here.collected()
    folders = [path.name for path in (there.run.root / "jobs").iterdir()]
    assert folders == ["judge.verdicts.local.000"]


def test_a_worker_that_is_killed_is_replaced(tmp_path: Path, server: JudgeServer) -> None:
    undisturbed = ready(tmp_path / "here", server)
    undisturbed.medtrain("run", undisturbed.config, *undisturbed.selection)
    chain = ready(tmp_path / "there", server)
    asked = server.asked.copy()
    server.hold(["q5", "q20"])
    going_on = start(chain)
    victim = next(iter(server.clients(1).values()))
    os.kill(victim, signal.SIGKILL)
    server.release()
    _, said = going_on.communicate(timeout=100)
    assert going_on.returncode == 0, said
    assert chain.collected() == undisturbed.collected()
    again = {row: n for row, n in (server.asked - asked).items() if n > 1}
    assert len(again) <= 2, "rows that were finished stand"


def test_an_endpoint_that_is_down_is_said_once(tmp_path: Path) -> None:
    chain = ready_to_judge(
        tmp_path,
        NO_CLUSTER,
        judge={"kind": "openai", "model": "m", "base_url": "http://127.0.0.1:9/v1",
               "max_retries": 0, "num_shards": 2},
    )  # fmt: skip
    done = medtrain("run", chain.config, *chain.selection, *WORKERS)
    assert done.returncode == 69, done.stderr
    assert "127.0.0.1:9" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(list((chain.run.root / "jobs").iterdir())) == 1, "and is not tried again"


@pytest.mark.parametrize("whole_group", [True, False], ids=["terminal", "process"])
def test_ctrl_c_ends_the_workers(whole_group: bool, tmp_path: Path, server: JudgeServer) -> None:
    """A terminal interrupts the whole group of processes, `kill -INT` just the first of them."""
    chain = ready(tmp_path, server)
    server.hold([f"q{n}" for n in range(24)])
    going_on = start(chain, start_new_session=True)
    workers = server.clients(2).values()
    (os.killpg if whole_group else os.kill)(going_on.pid, signal.SIGINT)
    _, said = going_on.communicate(timeout=60)
    assert going_on.returncode == 130, said
    assert "Run the same command to go on" in said
    wait_until(lambda: not any(map(is_alive, workers)), "the workers end")
    server.release()
    chain.medtrain("run", chain.config, *chain.selection, *WORKERS)
    assert chain.is_done("pairs")


def test_more_workers_than_shards_make_more_shards(tmp_path: Path) -> None:
    chain = ready(tmp_path)
    chain.medtrain("run", chain.config, *chain.selection, "--executor", "local", "--workers", "6")
    assert len(list((chain.run.judge / "shards").iterdir())) == 6


def test_an_executor_that_is_none(tmp_path: Path) -> None:
    chain = ready(tmp_path)
    done = medtrain("run", chain.config, "--executor", "slurm")
    assert done.returncode == 64
    assert "Valid: here, local" in done.stderr
