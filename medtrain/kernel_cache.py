"""Where kernels that are compiled for a GPU are kept, so that they are compiled once.

MEDTRAIN_KERNEL_CACHE, the user's cache, or the node's own disk → the first that is private and on
this machine → TRITON_CACHE_DIR and TORCHINDUCTOR_CACHE_DIR for this process and its children,
unless the user has set them.

By themselves Triton keeps its kernels in the home directory, and inductor in /tmp, which a job
often has for itself alone. A network file system is no place for either: processes of several nodes
that compile one kernel at a time fail there (https://github.com/triton-lang/triton/issues/11512),
or read files of two compilations (https://github.com/triton-lang/triton/pull/11319). Entries are
keyed by version and GPU by the tools themselves. The driver's own cache (CUDA_CACHE_PATH) and that
of compiled extensions (TORCH_EXTENSIONS_DIR) outlive a job already, and stay where they are.
"""

from __future__ import annotations

import os
import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

CACHE_VARIABLE = "MEDTRAIN_KERNEL_CACHE"
"""Names the directory, for a site that knows a better one: private to the user, and not shared by
nodes that compute at the same time."""
_TOOLS = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
_LOCAL = frozenset({
    "ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "tmpfs", "overlay",
})  # fmt: skip
_MOUNTS = Path("/proc/self/mountinfo")
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


def keep_compiled_kernels() -> Path | None:
    """Set both variables, before torch is imported; returns the directory, None without one.

    Where no directory is private the tools' own defaults stay: what lies there is executed.
    """
    if all(variable in os.environ for variable in _TOOLS):
        return None
    for directory in _candidates():
        with suppress(OSError):
            if _is_private(directory):
                for variable, name in _TOOLS.items():
                    os.environ.setdefault(variable, str(directory / name))
                return directory
    return None


def _candidates() -> Iterator[Path]:
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        yield Path(named).expanduser().absolute()
        return
    with suppress(RuntimeError):  # a user without a home
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        if cache.is_absolute() and is_on_this_machine(cache):
            yield cache / "medtrain" / "kernels"
    temporary = Path(tempfile.gettempdir())
    if is_on_this_machine(temporary):
        yield temporary / f"medtrain-kernels-{os.getuid()}"


def _is_private(directory: Path) -> bool:
    """Make a directory that nobody else may write to; whether it is one now."""
    _make(directory)
    found, above = directory.lstat(), directory.parent.stat()
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    # Whoever may rename it could put another in its place, but not where names are sticky.
    kept = not above.st_mode & _OTHERS_MAY_WRITE or bool(above.st_mode & stat.S_ISVTX)
    return ours and kept and not found.st_mode & _OTHERS_MAY_WRITE and os.access(directory, os.W_OK)


def _make(directory: Path) -> None:
    """With whatever is missing above it, all of it closed to others, whatever the umask says."""
    for above in (*reversed(directory.parents), directory):
        above.mkdir(mode=0o700, exist_ok=True)


def is_on_this_machine(path: Path, mounts: Path = _MOUNTS) -> bool:
    """Whether a path lies on a disk of this machine; of a kind that nobody knows it does not.

    Args:
        path: it need not exist yet.
        mounts: as proc(5) describes mountinfo.
    """
    real = path.resolve()
    kind, longest = "", -1
    with suppress(OSError):
        for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines():
            before, _, after = line.partition(" - ")
            point = Path(_unescaped(before.split(" ")[4]))
            # One that is mounted later hides what was there.
            if real.is_relative_to(point) and len(point.parts) >= longest:
                kind, longest = after.split(" ")[0], len(point.parts)
    return kind in _LOCAL


def _unescaped(point: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), point)
