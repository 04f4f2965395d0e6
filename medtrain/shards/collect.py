"""From the shards' result files to one file in request order, and a receipt for it.

receipts (looked at again while some are absent) → every file read once: checksum, row ids, where
each line lies → windows of the collected file, each gathered from the shards → receipt.json. The
bytes do not depend on the number of shards, so two collects at once write the same. One window is
in memory at a time, and fewer files are open than the process may open.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from medtrain.errors import DataError
from medtrain.files import atomic_writer, read_sealed, sealed, sha256_file, write_bytes
from medtrain.shards.plan import Layout, ids_digest
from medtrain.shards.receipts import distrust, receipt_that_holds, rows_path, sound_receipt
from medtrain.shards.shard_files import ShardFiles

_WINDOW_BYTES = 48 << 20
_LOOK_AGAIN_EVERY_S = 2.0
_OTHER_FILES = 200
"""Open files that are left to the rest of the process."""
_ID_STARTS = len(b'{"id": "')


class Collected(NamedTuple):
    """What a collected file holds."""

    rows: int
    errors: int
    tokens: int
    seconds: float
    """Sum over the shards."""
    sha256: str
    quarantined: int = 0
    """Of the errors: rows that killed their processes and were given up on."""


class UnsoundShardError(DataError):
    """A shard's file does not match its receipt; the receipt has been set aside."""


class MissingShardsError(UnsoundShardError):
    """Shards have no receipt that holds."""

    def __init__(self, stage: Path, shards: Sequence[int]) -> None:
        names = ", ".join(map(str, shards[:20]))
        more = f" and {len(shards) - 20} more" if len(shards) > 20 else ""
        super().__init__(
            f"Shards of {stage} are missing or were changed: {names}{more}",
            fix="Run or submit the stage again: finished rows are kept.",
        )
        self.shards = tuple(shards)


def receipt_path(stage: Path) -> Path:
    """The receipt of a stage's collected file."""
    return stage / "receipt.json"


def already_collected(plan: Layout, stage: Path, collected: Path) -> Collected | None:
    """What an earlier collect of the same plan wrote, if it is still there, byte for byte."""
    try:
        receipt = read_sealed(receipt_path(stage))
    except (FileNotFoundError, DataError):
        return None
    if receipt.get("plan_id") != plan.plan_id or not collected.exists():
        return None
    if collected.stat().st_size != receipt["bytes"] or sha256_file(collected) != receipt["sha256"]:
        return None
    return Collected(**{field: receipt[field] for field in Collected._fields if field in receipt})


def collect(plan: Layout, stage: Path, collected: Path, *, patience_s: float = 0.0) -> Collected:
    """Check every shard and publish the collected file and its receipt.

    Args:
        plan: the layout on disk is enough.
        stage: its directory.
        collected: the file to write.
        patience_s: how long to look again for receipts that seem to be absent: a network file
            system may remember for a minute that a file was not there.

    Raises:
        MissingShardsError: shards have no receipt, or their files were changed after publication.
    """
    receipts = _receipts(plan, stage, patience_s)
    lines = _checked_lines(plan, stage, receipts)
    size, sha256 = _write(plan, stage, receipts, lines, collected)
    summary = Collected(
        rows=plan.num_rows,
        errors=sum(r["errors"] for r in receipts),
        tokens=sum(r["tokens"] for r in receipts),
        seconds=round(sum(r["seconds"] for r in receipts), 3),
        sha256=sha256,
        quarantined=sum(r["quarantined"] for r in receipts),
    )
    receipt = {"plan_id": plan.plan_id, "bytes": size, **summary._asdict()}
    write_bytes(receipt_path(stage), sealed(receipt))
    return summary


def _receipts(plan: Layout, stage: Path, patience_s: float) -> list[dict[str, Any]]:
    """Every shard's receipt; those that do not hold to the end are set aside."""
    deadline = time.monotonic() + patience_s
    found: dict[int, dict[str, Any]] = {}
    missing = list(range(len(plan.shards)))
    while missing:
        last_look = time.monotonic() >= deadline
        look = sound_receipt if last_look else receipt_that_holds
        for shard in missing:
            receipt = look(plan, shard, ShardFiles(stage, shard))
            if receipt is not None:
                found[shard] = receipt
        missing = [shard for shard in missing if shard not in found]
        if missing and last_look:
            raise MissingShardsError(stage, missing)
        if missing:
            time.sleep(min(_LOOK_AGAIN_EVERY_S, patience_s))
    return [found[shard] for shard in sorted(found)]


class _Lines(NamedTuple):
    """Where each row's line lies, in request order."""

    shard: array[int]
    start: array[int]
    size: array[int]


def _checked_lines(plan: Layout, stage: Path, receipts: list[dict[str, Any]]) -> _Lines:
    """Read every shard's file once; all that do not hold are set aside before the error."""
    rows = plan.num_rows
    lines = _Lines(array("I", [0]) * rows, array("Q", [0]) * rows, array("I", [0]) * rows)
    changed: list[int] = []
    for shard, receipt in enumerate(receipts):
        files = ShardFiles(stage, shard)
        sizes = _sizes_of_sound_lines(files, plan.digests[shard], receipt)
        if sizes is None:
            distrust(files, receipt)
            changed.append(shard)
            continue
        start = 0
        for position, size in zip(plan.positions(shard), sizes, strict=True):
            lines.shard[position], lines.start[position], lines.size[position] = shard, start, size
            start += size
    if changed:
        raise MissingShardsError(stage, changed)
    return lines


def _sizes_of_sound_lines(
    files: ShardFiles, row_ids_digest: str, receipt: dict[str, Any]
) -> array[int] | None:
    """The sizes of a result file's lines, if its bytes and its row ids are as promised."""
    sha256, sizes, row_ids = hashlib.sha256(), array("I"), []
    try:
        with rows_path(files, receipt).open("rb") as handle:
            for line in handle:
                sha256.update(line)
                sizes.append(len(line))
                row_ids.append(_row_id(line))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    if sha256.hexdigest() != receipt["sha256"] or ids_digest(row_ids) != row_ids_digest:
        return None
    return sizes


def _row_id(line: bytes) -> str:
    """The id at the start of a line, without parsing what follows.

    Raises:
        ValueError: the line does not begin with one.
    """
    end = line.index(b'"', _ID_STARTS)
    row_id = line[_ID_STARTS:end]
    return str(json.loads(line)["id"]) if b"\\" in row_id else row_id.decode("utf-8")


def _write(
    plan: Layout, stage: Path, receipts: list[dict[str, Any]], lines: _Lines, collected: Path
) -> tuple[int, str]:
    sha256, size = hashlib.sha256(), 0
    with _Sources(stage, receipts) as sources, atomic_writer(collected) as handle:
        for first, last in _windows(lines.size):
            window = b"".join(_gathered(sources, lines, first, last))
            sha256.update(window)
            handle.write(window)
            size += len(window)
        if size != sum(lines.size):
            raise UnsoundShardError(
                f"A shard of {stage} was changed while it was collected", fix="Collect again."
            )
    return size, sha256.hexdigest()


def _windows(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges of rows whose lines fit into memory together."""
    first, held = 0, 0
    for row, size in enumerate(sizes):
        if held and held + size > _WINDOW_BYTES:
            yield first, row
            first, held = row, 0
        held += size
    if held:
        yield first, len(sizes)


def _gathered(sources: _Sources, lines: _Lines, first: int, last: int) -> list[bytes]:
    """The lines of a range of rows, in request order, gathered shard by shard."""
    gathered = [b""] * (last - first)
    by_shard: dict[int, list[int]] = {}
    for row in range(first, last):
        by_shard.setdefault(lines.shard[row], []).append(row)
    for shard, rows in by_shard.items():
        with sources.opened(shard) as descriptor:
            for row in rows:
                gathered[row - first] = os.pread(descriptor, lines.size[row], lines.start[row])
    return gathered


class _Sources:
    """The shards' result files: open once, as far as the limit on open files allows."""

    def __init__(self, stage: Path, receipts: list[dict[str, Any]]) -> None:
        self._stage, self._receipts = stage, receipts
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._capacity = max(0, (1 << 16 if limit < 0 else limit) - _OTHER_FILES)
        self._kept: dict[int, int] = {}

    @contextmanager
    def opened(self, shard: int) -> Iterator[int]:
        """A descriptor of a shard's file."""
        descriptor = self._kept.get(shard)
        if descriptor is not None:
            yield descriptor
            return
        path = rows_path(ShardFiles(self._stage, shard), self._receipts[shard])
        descriptor = os.open(path, os.O_RDONLY)
        if len(self._kept) < self._capacity:
            self._kept[shard] = descriptor
            yield descriptor
            return
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def __enter__(self) -> _Sources:
        return self

    def __exit__(self, *error: object) -> None:
        for descriptor in self._kept.values():
            os.close(descriptor)
