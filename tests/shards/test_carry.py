"""Settling a plan: finished rows survive another layout, a kill at any moment, and company."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medtrain.errors import DataError
from medtrain.files import publish, sealed
from medtrain.shards import carry, make_plan
from medtrain.shards.attempt import ShardFiles, run_attempt, sound_receipt
from medtrain.shards.carry import settle_plan
from medtrain.shards.plan import Plan

from .sets import bring, refuse, requests, run, square

FORK = multiprocessing.get_context("fork")


class Killed(BaseException):
    """Stands for a SIGKILL between two steps on the file system."""


def kill_before_step(number: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every step of carrying counts; the one of this number does not happen any more."""
    steps: list[str] = []

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **options: Any) -> Any:
            if len(steps) == number:
                raise Killed
            steps.append(name)
            return function(*arguments, **options)

        return step

    monkeypatch.setattr(Path, "rename", counted("rename", Path.rename))
    monkeypatch.setattr(Path, "mkdir", counted("mkdir", Path.mkdir))
    monkeypatch.setattr(shutil, "rmtree", counted("rmtree", shutil.rmtree))
    monkeypatch.setattr(carry, "write_bytes", counted("write", carry.write_bytes))
    monkeypatch.setattr(carry, "as_line", counted("line", carry.as_line))
    return steps


@pytest.mark.parametrize("back", [False, True])
def test_a_kill_at_any_moment_of_laying_out_anew_loses_no_row(tmp_path: Path, back: bool) -> None:
    rows = requests(12)
    expected = run(tmp_path / "0", rows, num_shards=3)
    new = make_plan(rows, {"model": "m"}, batch_size=2, num_shards=2)
    for number in range(200):
        directory = tmp_path / str(number)
        if number:
            run(directory, rows, num_shards=3)
        (directory / "collected.jsonl").unlink()
        with pytest.MonkeyPatch.context() as patch:
            steps = kill_before_step(number, patch)
            try:
                settle_plan(directory, new)
                killed = False
            except Killed:
                killed = True
        layout = {"num_shards": 3} if back else {"num_shards": 2, "batch_size": 2}
        assert run(directory, rows, refuse, **layout) == expected, steps
        assert not list(directory.glob("shards.*")), steps
        if not killed:
            assert {"rename", "mkdir", "rmtree", "write", "line"} == set(steps)
            return
    raise AssertionError("laying out anew takes more steps than expected")


def _settle(directory: Path, num_shards: int, adopt: bool, found: Any) -> None:
    plan = make_plan(requests(30), {"model": "m"}, num_shards=num_shards)
    found.put((len(settle_plan(directory, plan, adopt=adopt).shards), num_shards))


@pytest.mark.parametrize("locks", [True, False])
@pytest.mark.parametrize("stands", [True, False])
def test_tasks_that_settle_at_once_agree(
    tmp_path: Path, stands: bool, locks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not locks:

        def refuse_lock(handle: Any, operation: int) -> None:
            raise OSError(errno.ENOLCK, "no locks available")

        monkeypatch.setattr(fcntl, "flock", refuse_lock)
    if stands:
        settle_plan(tmp_path, make_plan(requests(30), {"model": "m"}, num_shards=7))
    found: Any = FORK.SimpleQueue()
    tasks = [
        FORK.Process(target=_settle, args=(tmp_path, 1 + number % 5, True, found))
        for number in range(12)
    ]
    for task in tasks:
        task.start()
    layouts = {found.get()[0] for _ in tasks}
    for task in tasks:
        task.join()
    assert len(layouts) == 1
    assert layouts == {7} or not stands
    assert layouts == {len(Plan.read(tmp_path / "plan.json").shards)}


def test_openers_of_different_layouts_take_turns(tmp_path: Path) -> None:
    expected = run(tmp_path, requests(30), num_shards=4)
    (tmp_path / "collected.jsonl").unlink()
    found: Any = FORK.SimpleQueue()
    tasks = [
        FORK.Process(target=_settle, args=(tmp_path, number, False, found))
        for number in range(1, 9)
    ]
    for task in tasks:
        task.start()
    assert all(got == wanted for got, wanted in [found.get() for _ in tasks])
    for task in tasks:
        task.join()
    assert run(tmp_path, requests(30), refuse, num_shards=3) == expected


def test_a_task_does_not_adopt_another_batch_size(tmp_path: Path) -> None:
    settle_plan(tmp_path, make_plan(requests(9), {}, batch_size=2, num_shards=2))
    plan = make_plan(requests(9), {}, batch_size=3, num_shards=1)
    assert settle_plan(tmp_path, plan, adopt=True).batch_size == 3


@pytest.mark.parametrize("damage", [None, b"", b'{"version": 2}'])
def test_a_plan_that_is_gone_takes_no_rows_with_it(tmp_path: Path, damage: bytes | None) -> None:
    expected = run(tmp_path, requests(20), num_shards=3, batch_size=2)
    (tmp_path / "collected.jsonl").unlink()
    if damage is None:
        (tmp_path / "plan.json").unlink()
    else:
        (tmp_path / "plan.json").write_bytes(damage)
    assert run(tmp_path, requests(20), refuse, num_shards=3, batch_size=2) == expected


def test_more_rows_than_the_buffer_holds_are_carried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(tmp_path, requests(40), num_shards=3)
    (tmp_path / "collected.jsonl").unlink()
    monkeypatch.setattr(carry, "_BUFFERED_BYTES", 100)
    assert run(tmp_path, requests(40), refuse, num_shards=5) == expected


def test_failed_rows_are_not_carried(tmp_path: Path) -> None:
    def half(batches: Any) -> Any:
        for batch in batches:
            for request in batch:
                odd = request.payload["x"] % 2
                yield request.id, {"error": "no"} if odd else {"y": 1}

    assert bring(tmp_path, requests(10), half, num_shards=2).errors == 5
    with pytest.raises(AssertionError, match="5 rows"):
        bring(tmp_path, requests(10), refuse, num_shards=1)


def test_a_plan_of_other_rows_is_not_bound(tmp_path: Path) -> None:
    settle_plan(tmp_path, make_plan(requests(5), {}))
    with pytest.raises(DataError, match="other rows or settings"):
        make_plan(requests(6), {}).bound_to(Plan.read(tmp_path / "plan.json"))


def test_an_attempt_whose_stage_is_laid_out_anew_meanwhile_harms_nothing(tmp_path: Path) -> None:
    expected = run(tmp_path / "whole", requests(12))
    directory = tmp_path / "moved"
    old = settle_plan(directory, make_plan(requests(12), {"model": "m"}, num_shards=2))
    new = make_plan(requests(12), {"model": "m"}, num_shards=3)

    def meanwhile(batches: Any) -> Any:
        for number, batch in enumerate(batches):
            if number == 3:
                settle_plan(directory, new)
            yield from square([[old.requests[int(row[4:])] for row in batch]])

    run_attempt(old, 0, ShardFiles(directory, 0), meanwhile, lambda result: None)
    assert ShardFiles(directory, 0).done.exists()
    assert run(directory, requests(12), num_shards=3) == expected


def test_a_receipt_of_another_layout_does_not_keep_one_from_being_published(
    tmp_path: Path,
) -> None:
    plan = settle_plan(tmp_path, make_plan(requests(4), {"model": "m"}))
    files = ShardFiles(tmp_path, 0)

    def beaten(batches: Any) -> Any:
        for batch in batches:
            yield from square([[plan.requests[int(row[4:])] for row in batch]])
        publish(files.done, sealed({"plan_id": plan.plan_id, "row_ids_digest": "of another"}))

    run_attempt(plan, 0, files, beaten, lambda result: None)
    assert sound_receipt(plan, 0, files) is not None
