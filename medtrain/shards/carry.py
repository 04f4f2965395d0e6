"""The plan that holds for a stage's directory, and finished rows that outlive an earlier layout.

plan → the one on disk, where it fits; else finished rows are carried from the old shards' journals
into journals of the new ones, in a directory of their own, which then takes the old one's place.
Many processes may settle one directory at the same time: one after the other, under a file lock.

    shards.new-*    being filled; worthless
    shards.old-*    the old shards, until the new plan stands; a settle that finds them was killed
                    between, and carries again from both
    shards.trash-*  no longer needed
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from medtrain.errors import DataError
from medtrain.files import fsync_directory, publish, sealed, write_bytes
from medtrain.shards.journal import as_line, read_journal
from medtrain.shards.liveness import AttemptMark, Beat
from medtrain.shards.plan import Layout, Plan
from medtrain.shards.quarantine import is_final
from medtrain.shards.shard_files import AttemptFiles, plan_path, shards_root

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_BUFFERED_BYTES = 64 << 20


def settle_plan(directory: Path, plan: Plan, *, adopt: bool = False) -> Plan:
    """The plan that holds for a directory: the one on disk where it has the same layout.

    The same plan id with another batch size or number of shards keeps finished rows: they are
    carried over, then the plan is replaced. Another plan id means that some rows are others. Those
    that are not are carried over if each row is alone in its batch, as the rows of an endpoint are:
    a verdict that was paid for stands. Rows that shared a batch had other neighbours, so that their
    last bits may differ; they go.

    Args:
        directory: of the stage.
        plan: what this process would do.
        adopt: take a standing plan of the same rows and batch size however it is cut into shards,
            as tasks do; without it the directory is laid out anew, as its opener does.
    """
    path = plan_path(directory)
    with _lock(directory):
        standing = _standing(directory)
        if standing is None and not _trees(directory):
            if publish(path, sealed(plan.to_json())):
                return plan
            standing = _standing(directory)
        if standing is not None and _fits(standing, plan, adopt=adopt):
            _remove(directory, "trash", "new")
            return plan.bound_to(standing)
        _lay_out_anew(directory, plan)
        return plan


def _fits(standing: Layout, plan: Plan, *, adopt: bool) -> bool:
    if adopt:
        return (standing.plan_id, standing.batch_size) == (plan.plan_id, plan.batch_size)
    return standing.same_layout(plan)


def _standing(directory: Path) -> Layout | None:
    """The plan on disk; None where there is none to trust, or the change to it was cut short."""
    if list(directory.glob("shards.old-*")):
        return None
    try:
        return Plan.read(plan_path(directory))
    except (FileNotFoundError, DataError):
        return None


def _trees(directory: Path) -> list[Path]:
    """Where finished rows may lie."""
    return [*directory.glob("shards.old-*"), *directory.glob("shards")]


def _lay_out_anew(directory: Path, plan: Plan) -> None:
    """Replace plan and shards; a kill at any point loses no finished row."""
    _remove(directory, "trash", "new")
    new = _name(directory, "new")
    new.mkdir(parents=True)
    _carry(_trees(directory), new, plan)
    if shards_root(directory).exists():
        shards_root(directory).rename(_name(directory, "old"))
    new.rename(shards_root(directory))
    fsync_directory(directory)
    write_bytes(plan_path(directory), sealed(plan.to_json()))
    for old in directory.glob("shards.old-*"):
        old.rename(_name(directory, "trash"))
    _remove(directory, "trash")


def _carry(sources: list[Path], new: Path, plan: Plan) -> None:
    """Append every finished row of the old trees to a journal in its new shard."""
    position = {request.id: i for i, request in enumerate(plan.requests)}
    shard_of = {i: shard for shard, rows in enumerate(plan.shards) for i in rows}
    done = bytearray(len(plan.requests))
    with _Carried(new, plan) as carried:
        for attempt in _attempts(sources, plan):
            for record in read_journal(attempt.journal):
                row = position.get(record.get("id", ""))
                if row is None or done[row] or record.get("request") != plan.row_hashes[row]:
                    continue
                error = "error" in record["result"]
                if not error or (is_final(record["result"]) and not attempt.forgiven.exists()):
                    done[row] = not error
                    carried.append(shard_of[row], as_line(record))


def _attempts(sources: list[Path], plan: Plan) -> Iterator[AttemptFiles]:
    """Attempts whose rows may be those of the new plan, see `settle_plan`."""
    for journal in sorted(path for tree in sources for path in tree.glob("*/*/journal.jsonl")):
        files = AttemptFiles(journal.parent)
        mark = AttemptMark.read(files)
        if mark is not None and (
            mark.plan_id == plan.plan_id or mark.batch_size == plan.batch_size == 1
        ):
            yield files


class _Carried:
    """One journal a new shard, written through buffers: there may be more than open files."""

    def __init__(self, root: Path, plan: Plan) -> None:
        self._root, self._plan = root, plan
        mark = AttemptMark.mine(plan.plan_id, plan.batch_size)
        self._mark = replace(mark, attempt=f"carried-{uuid.uuid4().hex[:8]}")
        self._lines: dict[int, list[bytes]] = {}
        self._rows: dict[int, int] = {}
        self._bytes = 0

    def append(self, shard: int, line: bytes) -> None:
        """Add a journal line to a shard."""
        self._lines.setdefault(shard, []).append(line)
        self._bytes += len(line)
        if self._bytes >= _BUFFERED_BYTES:
            self._flush()

    def _flush(self) -> None:
        for shard, lines in self._lines.items():
            files = self._files(shard)
            if shard not in self._rows:
                self._mark.write(files)
            with files.journal.open("ab") as journal:
                journal.writelines(lines)
                journal.flush()
                os.fsync(journal.fileno())
            self._rows[shard] = self._rows.get(shard, 0) + len(lines)
        self._lines.clear()
        self._bytes = 0

    def _files(self, shard: int) -> AttemptFiles:
        return AttemptFiles(self._root / f"{shard:05d}" / self._mark.attempt)

    def __enter__(self) -> _Carried:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None:
            self._flush()
            for shard, rows in self._rows.items():
                files = self._files(shard)
                Beat(rows=rows, at=time.time()).write(files.ended("carried"))


def _name(directory: Path, kind: str) -> Path:
    return directory / f"shards.{kind}-{uuid.uuid4().hex[:8]}"


def _remove(directory: Path, *kinds: str) -> None:
    for kind in kinds:
        for path in directory.glob(f"shards.{kind}-*"):
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """Held by one process at a time. Where the file system has no locks, the plan's publication
    still lets one of many first comers win."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".settle.lock").open("ab") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield
