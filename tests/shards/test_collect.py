"""Collecting: every byte checked, absence doubted for a while, and few files open."""

from __future__ import annotations

import json
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from medtrain.errors import DataError
from medtrain.shards import Request, make_plan
from medtrain.shards import collect as collecting
from medtrain.shards.attempt import ShardFiles
from medtrain.shards.carry import settle_plan
from medtrain.shards.collect import MissingShardsError, UnsoundShardError, collect
from medtrain.shards.plan import Layout, Plan, ids_digest

from .sets import requests, run


def finished_stage(directory: Path, count: int = 20, **layout: int) -> tuple[Layout, bytes]:
    """A stage whose shards are finished and whose collected file is gone."""
    expected = run(directory, requests(count), **layout)
    (directory / "collected.jsonl").unlink()
    (directory / "receipt.json").unlink()
    return Plan.read(directory / "plan.json"), expected


def test_the_layout_on_disk_is_enough(tmp_path: Path) -> None:
    layout, expected = finished_stage(tmp_path, num_shards=3)
    assert not isinstance(layout, Plan)
    summary = collect(layout, tmp_path, tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == expected
    assert (summary.rows, summary.errors, summary.quarantined) == (20, 0, 0)


def test_missing_shards_are_named(tmp_path: Path) -> None:
    layout, _ = finished_stage(tmp_path, num_shards=5)
    ShardFiles(tmp_path, 1).done.unlink()
    rows = next((tmp_path / "shards/00003").glob("*/rows.jsonl"))
    rows.write_bytes(rows.read_bytes()[:-2] + b"!\n")
    with pytest.raises(MissingShardsError) as missing:
        collect(layout, tmp_path, tmp_path / "out.jsonl")
    # What has no receipt is seen before any file is read.
    assert missing.value.shards == (1,)
    assert isinstance(missing.value, UnsoundShardError)
    assert missing.value.exit_code == DataError.exit_code
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "swapped", "id"])
def test_a_changed_file_takes_its_receipt_with_it(tmp_path: Path, damage: str) -> None:
    layout, _ = finished_stage(tmp_path, num_shards=2)
    rows = next((tmp_path / "shards/00001").glob("*/rows.jsonl"))
    content = rows.read_bytes()
    lines = content.splitlines(keepends=True)
    if damage == "gone":
        rows.unlink()
    else:
        rows.write_bytes(
            {
                "flip": content[:50] + bytes([content[50] ^ 1]) + content[51:],
                "cut": content[:-1],
                "swapped": b"".join([lines[1], lines[0], *lines[2:]]),
                "id": content.replace(b'{"id": "', b'{"ie": "', 1),
            }[damage]
        )
    with pytest.raises(MissingShardsError) as missing:
        collect(layout, tmp_path, tmp_path / "out.jsonl")
    assert missing.value.shards == (1,)
    assert not ShardFiles(tmp_path, 1).done.exists()
    assert list((tmp_path / "shards/00001").glob("done.json.unsound-*"))


def test_a_receipt_for_other_rows_is_no_receipt(tmp_path: Path) -> None:
    layout, _ = finished_stage(tmp_path, num_shards=2)
    one, two = ShardFiles(tmp_path, 0), ShardFiles(tmp_path, 1)
    two.done.write_bytes(one.done.read_bytes())
    with pytest.raises(MissingShardsError):
        collect(layout, tmp_path, tmp_path / "out.jsonl")


def test_absence_is_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, expected = finished_stage(tmp_path, num_shards=3)
    done = ShardFiles(tmp_path, 2).done
    away = done.rename(done.with_name("away"))
    looks = []

    def appear(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            away.rename(done)

    monkeypatch.setattr(time, "sleep", appear)
    collect(layout, tmp_path, tmp_path / "out.jsonl", patience_s=3600)
    assert (tmp_path / "out.jsonl").read_bytes() == expected
    assert len(looks) == 3


def test_two_collects_at_once_write_the_same(tmp_path: Path) -> None:
    layout, expected = finished_stage(tmp_path, 200, num_shards=7)
    out = tmp_path / "out.jsonl"
    threads = [threading.Thread(target=collect, args=(layout, tmp_path, out)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert out.read_bytes() == expected
    assert not list(tmp_path.glob(".tmp-*"))


def test_more_shards_than_open_files_and_more_rows_than_a_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, expected = finished_stage(tmp_path, 60, num_shards=60)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_now = len(list(Path("/proc/self/fd").iterdir()))
    monkeypatch.setattr(collecting, "_OTHER_FILES", open_now + 10)
    monkeypatch.setattr(collecting, "_WINDOW_BYTES", 300)
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 30, hard))
    try:
        collect(layout, tmp_path, tmp_path / "out.jsonl")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (tmp_path / "out.jsonl").read_bytes() == expected
    assert len(list(Path("/proc/self/fd").iterdir())) <= open_now + 1


IDS = ['quote"d', "back\\slash", "é🙂", "new\nline", "\ud800", '", "id": "x', ""]


def test_any_text_may_be_an_id(tmp_path: Path) -> None:
    rows = [Request(name, {"x": i}) for i, name in enumerate(IDS)]

    def echo(batches: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        for batch in batches:
            for request in batch:
                yield request.id, {"x": request.payload["x"], "text": "\ud800é"}

    lines = run(tmp_path, rows, echo, num_shards=3).splitlines()
    assert [(json.loads(line)["id"], json.loads(line)["x"]) for line in lines] == [
        (name, i) for i, name in enumerate(IDS)
    ]


def test_a_plan_on_disk_is_small_and_comes_back_equal(tmp_path: Path) -> None:
    rows = [Request(f"a-rather-long-identifier-{i:020d}", {"x": i}) for i in range(5000)]
    plan = settle_plan(tmp_path, make_plan(rows, {}, batch_size=7, num_shards=11))
    layout = Plan.read(tmp_path / "plan.json")
    assert layout.same_layout(plan)
    assert plan.same_layout(layout)
    assert (tmp_path / "plan.json").stat().st_size < 8 * len(rows)
    for shard, digest in enumerate(layout.digests):
        assert digest == ids_digest([row.id for row in plan.rows(shard)])
        assert plan.bound_to(layout).rows(shard) == plan.rows(shard)
