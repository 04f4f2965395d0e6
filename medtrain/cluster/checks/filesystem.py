"""The file system that runs are kept on: room, and the promises that the shard protocol builds on.

nearest directory that exists → free space and inodes → a scratch directory in it → hard link,
rename, exclusive create, flock, fsync, and the server's clock tried for real → nothing is left.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from medtrain.cluster.checks.finding import Finding, failed, passed, skipped, warned
from medtrain.config import RunConfig

GIB = 2**30
USUAL_GB, LEAST_GB = 50.0, 1.0
MANY_INODES, LEAST_INODES = 100_000, 1_000
SLOW_FSYNC_S = 0.5
SKEW_WARN_S, SKEW_FAIL_S = 1.0, 60.0
"""Heartbeats and lease times compare a file's time with this host's clock."""

_COPIES = 4
"""Of a base's size: two merged models, and what training and publishing hold for a while."""
_ELSEWHERE = "Choose another output_dir, on a file system for large data."


def check_file_system(directory: Path, config: RunConfig | None) -> list[Finding]:
    """Everything about the place where runs are kept; `directory` need not exist yet."""
    here = nearest_existing(directory)
    found = [_space(here, config), _inodes(here), _closed_to_others(directory, config)]
    try:
        with scratch_directory(here) as scratch:
            found += [check(scratch) for check in _PROMISES]
    except OSError as error:
        found.append(_not_writable(here, error))
    return found


def nearest_existing(directory: Path) -> Path:
    """The directory itself, or the closest one above it that exists."""
    path = directory.expanduser().absolute()
    return next(p for p in (path, *path.parents) if p.is_dir())


@contextmanager
def scratch_directory(directory: Path) -> Iterator[Path]:
    """A directory of ours inside `directory` that is gone afterwards."""
    scratch = Path(tempfile.mkdtemp(prefix=".medtrain-doctor-", dir=directory))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _not_writable(here: Path, error: OSError) -> Finding:
    return failed(
        "write access",
        f"{here}: {error.strerror}",
        f"Look at its owner, its permissions and your quota. {_ELSEWHERE}",
        directory=str(here),
    )


def _space(here: Path, config: RunConfig | None) -> Finding:
    stats = os.statvfs(here)
    free = stats.f_bavail * stats.f_frsize / GIB
    wanted = _wanted_gb(config)
    facts = {"directory": str(here), "free_gb": round(free, 1), "wanted_gb": round(wanted, 1)}
    shown = f"{free:,.1f} GiB free in {here}"
    if free < LEAST_GB:
        return failed("disk space", shown, f"Free some space. {_ELSEWHERE}", **facts)
    if free < wanted:
        return warned("disk space", f"{shown}; a run may need {wanted:,.0f} GiB",
                      f"Free some space. {_ELSEWHERE}", **facts)  # fmt: skip
    return passed("disk space", shown, **facts)


def _wanted_gb(config: RunConfig | None) -> float:
    """Room for a run, in GiB: from the base's size where it lies here, else the usual."""
    if config is None:
        return USUAL_GB
    if config.model.base.startswith("builtin:"):
        return LEAST_GB
    base = Path(config.model.base).expanduser()
    if not base.is_dir():
        return USUAL_GB
    weights = sum(p.stat().st_size for p in base.glob("*.safetensors"))
    return LEAST_GB + _COPIES * weights / GIB


def _inodes(here: Path) -> Finding:
    stats = os.statvfs(here)
    if stats.f_files == 0:
        return skipped("inodes", "this file system does not count them")
    free = stats.f_favail
    fix = f"Delete small files (old shards, caches). {_ELSEWHERE}"
    if free < MANY_INODES:
        kind = failed if free < LEAST_INODES else warned
        return kind("inodes", f"{free:,} free in {here}", fix, free=free)
    return passed("inodes", f"{free:,} free", free=free)


def _closed_to_others(directory: Path, config: RunConfig | None) -> Finding:
    """Nobody but the owner and the group may write to a run."""
    run = directory / config.name if config is not None else directory
    for path in (run, directory):
        if path.is_dir() and path.stat().st_mode & 0o002:
            found, fix = f"every user of this machine may write to {path}", f"chmod o-w {path}"
            is_run = (path / "stages").is_dir()
            return (failed if is_run else warned)("permissions", found, fix, path=str(path))
    if not directory.is_dir():
        return skipped("permissions", f"{directory} does not exist yet")
    return passed("permissions", "other users may not write there", path=str(directory))


def _writes(scratch: Path) -> Finding:
    started = time.perf_counter()
    with (scratch / "written").open("xb") as handle:
        handle.write(bytes(2**20))
        handle.flush()
        os.fsync(handle.fileno())
    descriptor = os.open(scratch, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
    seconds = time.perf_counter() - started
    shown = f"1 MiB written and fsynced in {seconds * 1000:,.0f} ms"
    if seconds > SLOW_FSYNC_S:
        return warned("write access", shown, f"Shards would wait for the disk. {_ELSEWHERE}",
                      seconds=round(seconds, 4))  # fmt: skip
    return passed("write access", shown, seconds=round(seconds, 4))


def _hard_links(scratch: Path) -> Finding:
    source, target = scratch / "link-source", scratch / "link-target"
    source.write_bytes(b"first")
    try:
        os.link(source, target)
    except OSError as error:
        return warned(
            "hard links", f"not here ({error.strerror}): results are published by directory claims",
            "Nothing must be done; a file system with hard links is safer.",
        )  # fmt: skip
    try:
        os.link(source, target)
    except FileExistsError:
        return passed("hard links", "the first of two publishers wins")
    return failed("hard links", "a second link replaced the first: two results could be published",
                  _ELSEWHERE)  # fmt: skip


def _rename(scratch: Path) -> Finding:
    old, new = scratch / "old", scratch / "new"
    old.write_bytes(b"old")
    new.write_bytes(b"new")
    with old.open("rb") as reader:
        new.replace(old)
        whole = reader.read() == b"old" and old.read_bytes() == b"new" and not new.exists()
    if whole:
        return passed("atomic rename", "replaces a file that is being read")
    return failed("atomic rename", "a reader saw a file change under it", _ELSEWHERE)


def _exclusive_create(scratch: Path) -> Finding:
    (scratch / "once").touch()
    try:
        (scratch / "once").open("x").close()
    except FileExistsError:
        return passed("exclusive create", "a second creator is refused")
    return failed("exclusive create", "O_EXCL lets a second creator in", _ELSEWHERE)


def _locks(scratch: Path) -> Finding:
    path = scratch / "lock"
    fix = "Mount with locks (Lustre: -o flock; NFS: not nolock), or choose another output_dir."
    with path.open("w") as first, path.open("w") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return failed("flock", f"not here: {error.strerror}", fix)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return passed("flock", "a second holder is refused")
    return failed("flock", "two holders at a time: two runs could work in one directory", fix)


def _times(scratch: Path) -> Finding:
    stamps = []
    skew = 0.0
    for number in range(5):
        path = scratch / f"time-{number}"
        before = time.time()
        path.touch()
        after = time.time()
        stamps.append(path.stat().st_mtime_ns)
        skew = max(skew, outside(stamps[-1] / 1e9, before, after), key=abs)
        time.sleep(0.005)
    whole_seconds = all(stamp % 10**9 == 0 for stamp in stamps)
    # A file system may round down to its granularity, and kernels by a tick of some milliseconds.
    slack = 1.0 if whole_seconds else 0.02
    skew = 0.0 if abs(skew) <= slack else skew
    facts = {"skew_s": round(skew, 3), "granularity": "1 s" if whole_seconds else "finer than 1 s"}
    shown = f"{skew:+.2f} s to this host, granularity {facts['granularity']}"
    if abs(skew) > SKEW_WARN_S:
        kind = failed if abs(skew) > SKEW_FAIL_S else warned
        return kind("file times", shown, "Have NTP (chrony) set the clocks of host and server.",
                    **facts)  # fmt: skip
    if whole_seconds:
        return warned("file times", shown, "Changes within a second may go unseen: leave a second "
                      "between writing data files and a run.", **facts)  # fmt: skip
    return passed("file times", shown, **facts)


def outside(value: float, low: float, high: float) -> float:
    """How far a value lies outside an interval; negative below it."""
    return min(value - low, 0.0) + max(value - high, 0.0)


_PROMISES: tuple[Callable[[Path], Finding], ...] = (
    _writes, _hard_links, _rename, _exclusive_create, _locks, _times,
)  # fmt: skip
