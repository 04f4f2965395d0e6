"""How far a stage is, who works on it, and what it took."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medtrain.errors import BadNodeError
from medtrain.shards import Progress, shard_progress
from medtrain.shards.attempt import ShardFiles
from medtrain.shards.failures import shard_failures
from medtrain.shards.liveness import AttemptMark, Beat

from .processes import start
from .sets import Rows, refuse, requests, run, square


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "this never happens"
        time.sleep(0.01)


def stops_after(rows: int, error: BaseException) -> Callable[[Any], Rows]:
    def work(batches: Any) -> Rows:
        for number, pair in enumerate(square(batches)):
            if number == rows:
                raise error
            yield pair

    return work


def test_no_plan_is_no_progress(tmp_path: Path) -> None:
    assert shard_progress(tmp_path) == Progress(0, 0)


def test_a_finished_stage(tmp_path: Path) -> None:
    run(tmp_path, requests(20), num_shards=3)
    progress = shard_progress(tmp_path)
    assert progress[:2] == (20, 20)
    assert (progress.shards_done, progress.shards_total) == (3, 3)
    assert (progress.tokens, progress.errors, progress.open_attempts) == (60, 0, ())
    assert progress.rows_per_s > 0


def test_gpu_seconds_and_what_was_wasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, requests(10), stops_after(6, KeyboardInterrupt()))
    attempt = next(ShardFiles(tmp_path, 0).attempts())
    mark, ended = AttemptMark.read(attempt), attempt.end_mark()
    assert mark is not None
    assert ended is not None
    began = mark.started_at
    Beat(6, 6, 0, began + 5, began + 50, began + 60).write(ended)
    progress = shard_progress(tmp_path)
    assert progress.done == 6
    assert progress.gpu_seconds == pytest.approx(240)
    assert progress.gpu_seconds_wasted == pytest.approx(40)


def test_a_running_and_a_killed_attempt(tmp_path: Path) -> None:
    process = start(tmp_path, 50, row_s=1.0)
    wait_for(lambda: shard_progress(tmp_path).open_attempts)
    (attempt,) = shard_progress(tmp_path).open_attempts
    assert attempt.alive
    assert (attempt.shard, attempt.total) == (0, 50)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (attempt,) = shard_progress(tmp_path).open_attempts
    assert not attempt.alive
    run(tmp_path, requests(50))
    assert shard_progress(tmp_path).open_attempts == ()


def test_a_damaged_heartbeat_has_the_journal_counted(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, requests(10), stops_after(7, KeyboardInterrupt()))
    ended = next(ShardFiles(tmp_path, 0).attempts()).end_mark()
    assert ended is not None
    ended.write_text("{")
    assert shard_progress(tmp_path).done == 7


def test_a_failure_says_what_and_where_until_the_shard_is_done(tmp_path: Path) -> None:
    broken = BadNodeError("No GPU", fix="Exclude the node")
    with pytest.raises(BadNodeError):
        run(tmp_path, requests(10), stops_after(3, broken), num_shards=2)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, requests(10), stops_after(1, ZeroDivisionError("x")), num_shards=2)
    first, second = shard_failures(tmp_path)
    assert (first.shard, first.exit_code, first.message) == (0, 78, "No GPU")
    assert first.fix == "Exclude the node"
    assert first.host
    assert second.exit_code == 70
    run(tmp_path, requests(10), num_shards=2)
    assert shard_failures(tmp_path) == []
    run(tmp_path, requests(10), refuse, num_shards=2)


def test_an_interrupt_is_no_failure(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, requests(10), stops_after(3, KeyboardInterrupt()))
    assert shard_failures(tmp_path) == []
