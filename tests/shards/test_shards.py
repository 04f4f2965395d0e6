"""The shard protocol: every row once, whatever is killed, damaged or laid out anew."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medtrain.errors import DataError
from medtrain.files import json_line
from medtrain.shards import Request, make_plan, shard_progress

from .processes import start
from .sets import Rows, bring, refuse, requests, run, square


@given(
    count=st.integers(0, 40),
    batch_size=st.integers(1, 9),
    shards=st.integers(1, 12),
    costs=st.randoms(use_true_random=False),
)
def test_a_plan_holds_every_row_once(
    count: int, batch_size: int, shards: int, costs: random.Random
) -> None:
    rows = [Request(f"r{i}", {}, cost=costs.random()) for i in range(count)]
    plan = make_plan(rows, {}, batch_size=batch_size, num_shards=shards)
    placed = sorted(i for shard in range(len(plan.shards)) for i in plan.positions(shard))
    assert placed == list(range(count))
    one = make_plan(rows, {}, batch_size=batch_size, num_shards=1)
    batches = [batch for shard in range(len(plan.shards)) for batch in plan.batches(shard)]
    assert sorted(batches) == sorted(one.batches(0))
    assert plan.plan_id == one.plan_id


def test_plan_id_covers_what_changes_results() -> None:
    rows = requests(5)
    plain = make_plan(rows, {"t": 1}).plan_id
    assert make_plan(rows, {"t": 1}, batch_size=3, num_shards=2).plan_id == plain
    assert make_plan(rows, {"t": 2}).plan_id != plain
    assert make_plan(rows[::-1], {"t": 1}).plan_id != plain
    assert make_plan([Request("row-0", {"x": 9}), *rows[1:]], {"t": 1}).plan_id != plain


def test_two_rows_of_one_id_are_refused() -> None:
    with pytest.raises(DataError, match="row-1"):
        make_plan([*requests(3), Request("row-1", {})], {})


def test_any_number_of_shards_gives_the_same_bytes(tmp_path: Path) -> None:
    results = {
        run(tmp_path / str(n), requests(50), num_shards=n, batch_size=4) for n in (1, 3, 7, 60)
    }
    assert len(results) == 1


def test_no_rows_is_an_empty_file(tmp_path: Path) -> None:
    assert run(tmp_path, []) == b""


def test_a_finished_stage_computes_nothing(tmp_path: Path) -> None:
    first = run(tmp_path, requests(20), num_shards=3)
    assert run(tmp_path, requests(20), refuse, num_shards=3) == first
    assert run(tmp_path, requests(20), refuse, num_shards=5, batch_size=2) == first


def test_another_layout_keeps_finished_rows(tmp_path: Path) -> None:
    first = run(tmp_path, requests(20), num_shards=3)
    (tmp_path / "collected.jsonl").unlink()
    assert run(tmp_path, requests(20), refuse, num_shards=2, batch_size=4) == first


def test_other_settings_compute_anew(tmp_path: Path) -> None:
    run(tmp_path, requests(5))
    with pytest.raises(AssertionError, match="5 rows"):
        bring(tmp_path, requests(5), refuse, {"model": "n"})


def test_more_rows_keep_finished_ones_that_had_no_neighbours(tmp_path: Path) -> None:
    run(tmp_path / "alone", requests(5))
    with pytest.raises(AssertionError, match="1 rows"):
        run(tmp_path / "alone", requests(6), refuse)
    run(tmp_path / "alone", requests(6))
    assert run(tmp_path / "alone", requests(4), refuse) == run(tmp_path / "new", requests(4))
    # In a batch a result can differ in its last bits with the company.
    run(tmp_path / "together", requests(5), batch_size=2)
    with pytest.raises(AssertionError, match="6 rows"):
        run(tmp_path / "together", requests(6), refuse, batch_size=2)


def test_looking_at_progress_changes_nothing(tmp_path: Path) -> None:
    run(tmp_path, requests(5))
    for receipt in tmp_path.glob("shards/*/done.json"):
        receipt.write_bytes(b"{}")
    before = sorted(tmp_path.rglob("*"))
    assert shard_progress(tmp_path).done == 5
    assert sorted(tmp_path.rglob("*")) == before


def test_interrupted_work_goes_on_where_it_stopped(tmp_path: Path) -> None:
    expected = run(tmp_path / "whole", requests(30), num_shards=2, batch_size=4)
    seen: list[str] = []

    def stumble(batches: list[list[Request]]) -> Rows:
        for row_id, result in square(batches):
            if len(seen) == 13:
                raise KeyboardInterrupt
            seen.append(row_id)
            yield row_id, result

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", requests(30), stumble, num_shards=2, batch_size=4)
    assert shard_progress(tmp_path / "cut").done == 13
    again: list[str] = []

    def note(batches: list[list[Request]]) -> Rows:
        for row_id, result in square(batches):
            again.append(row_id)
            yield row_id, result

    assert run(tmp_path / "cut", requests(30), note, num_shards=2, batch_size=4) == expected
    # A batch is computed whole or not at all, so at most three rows of 13 are computed again.
    assert len(set(again) & set(seen)) <= 3
    assert set(again) | set(seen) == {r.id for r in requests(30)}


def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    layout = {"num_shards": 3, "batch_size": 4}
    expected = run(tmp_path / "whole", requests(60), **layout)
    cut, chance = tmp_path / "cut", random.Random(5)
    for _ in range(4):
        process = start(cut, 60, row_s=0.01, **layout)
        while not list(cut.glob("shards/*/*/journal.jsonl")) and process.poll() is None:
            time.sleep(0.01)
        time.sleep(chance.uniform(0.0, 0.3))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert run(cut, requests(60), **layout) == expected


def test_several_writers_of_one_shard(tmp_path: Path) -> None:
    expected = run(tmp_path / "whole", requests(30), batch_size=4)
    together = tmp_path / "together"
    processes = [start(together, 30, row_s=0.01, batch_size=4) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert (together / "collected.jsonl").read_bytes() == expected
    assert len(list(together.glob("shards/*/done.json*"))) == 1


def test_a_killed_writer_beside_a_living_one_harms_nothing(tmp_path: Path) -> None:
    expected = run(tmp_path / "whole", requests(30))
    together = tmp_path / "together"
    dies = start(together, 30, row_s=0.2)
    wait_for_journals(together, 1)
    lives = start(together, 30, row_s=0.05)
    wait_for_journals(together, 2)
    os.kill(dies.pid, signal.SIGKILL)
    dies.wait()
    assert lives.wait() == 0
    assert (together / "collected.jsonl").read_bytes() == expected


def wait_for_journals(directory: Path, count: int) -> None:
    deadline = time.monotonic() + 100
    while len(list(directory.glob("shards/*/*/journal.jsonl"))) < count:
        assert time.monotonic() < deadline, "a writer has not begun"
        time.sleep(0.01)


def damage(victim: Path, how: str, share: float) -> None:
    content = victim.read_bytes()
    at = int(len(content) * share)
    if how == "delete":
        victim.unlink()
    elif how == "truncate":
        victim.write_bytes(content[:at])
    elif content:
        victim.write_bytes(content[:at] + bytes([content[at] ^ 0x15]) + content[at + 1 :])


HOW = st.sampled_from(["delete", "truncate", "flip"])
SHARE = st.floats(0, 1, exclude_max=True)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_damage_to_any_file_is_mended(data: st.DataObject, tmp_path_factory: Any) -> None:
    directory = tmp_path_factory.mktemp("damage")
    expected = run(directory, requests(20), num_shards=2, batch_size=3)
    (directory / "collected.jsonl").unlink()
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    numbers = st.lists(st.integers(0, len(files) - 1), min_size=1, max_size=3, unique=True)
    for victim in [files[number] for number in data.draw(numbers)]:
        damage(victim, data.draw(HOW), data.draw(SHARE))
    assert run(directory, requests(20), num_shards=2, batch_size=3) == expected


def stops_at(number: int, error: type[BaseException]) -> Any:
    """Work that ends at its n-th row, whatever happens to have been asked for."""

    def work(batches: list[list[Request]]) -> Rows:
        for done, pair in enumerate(square(batches)):
            if done == number:
                raise error
            yield pair

    return work


EVENTS = st.one_of(
    st.tuples(st.just("stop"), st.integers(0, 9), st.sampled_from([KeyboardInterrupt, OSError])),
    st.tuples(st.just("damage"), st.integers(0, 10**6), HOW, SHARE),
)
LAYOUTS = st.tuples(st.integers(1, 8), st.sampled_from([1, 3]))


@given(st.lists(st.tuples(LAYOUTS, EVENTS), max_size=8), LAYOUTS)
@settings(max_examples=60, deadline=None)
def test_any_history_ends_in_the_same_bytes(
    tmp_path_factory: Any, history: list[Any], last: tuple[int, int]
) -> None:
    directory = tmp_path_factory.mktemp("history")
    for (num_shards, batch_size), (event, *details) in history:
        if event == "stop":
            with suppress(KeyboardInterrupt, OSError):
                work = stops_at(*details)
                run(directory, requests(20), work, num_shards=num_shards, batch_size=batch_size)
        elif files := sorted(p for p in directory.rglob("*") if p.is_file()):
            number, how, share = details
            damage(files[number % len(files)], how, share)
    expected = b"".join(
        json_line({"id": row_id, **result}) for row_id, result in square([requests(20)])
    )
    assert run(directory, requests(20), num_shards=last[0], batch_size=last[1]) == expected


def test_failed_rows_are_tried_again_and_others_are_not(tmp_path: Path) -> None:
    calls: list[str] = []

    def flaky(batches: list[list[Request]]) -> Rows:
        for batch in batches:
            for request in batch:
                calls.append(request.id)
                failed = request.id == "row-3" and calls.count("row-3") == 1
                yield request.id, {"error": "timed out"} if failed else {"y": 1}

    assert bring(tmp_path, requests(6), flaky).errors == 1
    assert bring(tmp_path, requests(6), flaky).errors == 0
    assert calls.count("row-3") == 2
    assert len(calls) == 7
