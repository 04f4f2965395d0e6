"""Digests of files and directories that may be large: hashed once, or looked at in places."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from medtrain.files import digest_of, sha256_file, tree_files

_WINDOWS, _WINDOW_BYTES = 256, 1 << 14


def files_digest(paths: Iterable[Path], known: Mapping[str, Any]) -> dict[str, Any]:
    """Size, time and sha256 of outside files; a known hash is reused while size and time hold."""
    described: dict[str, Any] = {}
    for path in paths:
        stat, before = path.stat(), known.get(str(path))
        seen = (before["bytes"], before["mtime_ns"]) if before else None
        unchanged = before is not None and seen == (stat.st_size, stat.st_mtime_ns)
        described[str(path)] = before if unchanged else file_entry(path)
    return described


def quick_digest(directory: Path) -> str:
    """A quick digest of a model directory: names, sizes, and windows spread over every file.

    Hashing 16 GB takes longer than loading them. Training changes whole layers, so that some of
    the windows of a file see it.
    """
    parts: list[tuple[str, int, str]] = []
    for file in tree_files(directory):
        size = file.stat().st_size
        sha = hashlib.sha256()
        with file.open("rb") as handle:
            for window in range(_WINDOWS):
                handle.seek(max(0, size - _WINDOW_BYTES) * window // (_WINDOWS - 1))
                sha.update(handle.read(_WINDOW_BYTES))
        parts.append((file.relative_to(directory).as_posix(), size, sha.hexdigest()))
    return digest_of(parts)


def file_entry(path: Path) -> dict[str, Any]:
    """Size, time and sha256 of one file."""
    stat = path.stat()
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256_file(path)}
