"""An append-only file of what an attempt did that survives a kill at any byte.

A line is `crc32 json\\n`: a finished row (`id`, `request`, `result`), or the rows that are being
computed from here on (`pulled`). A torn or damaged line fails its check and is left out: that row
is computed again. Lines reach the disk every few seconds.
"""

from __future__ import annotations

import json
import os
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

FSYNC_EVERY_S = 2.0


class Journal:
    """The writer of one attempt; use it as a context manager.

    An engine may pull batches on one thread while rows finish on another, and a third one may ask
    for a sync.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = path.open("xb")
        self._synced = time.monotonic()
        self._lock = threading.Lock()

    def append(self, record: dict[str, Any]) -> None:
        """Add one finished row."""
        line = as_line(record)
        with self._lock:
            self._handle.write(line)
            self._handle.flush()
            if time.monotonic() - self._synced >= FSYNC_EVERY_S:
                self._sync()

    def pulled(self, rows: Sequence[str], *, alone: bool = False) -> None:
        """Note that these rows are being computed; `alone`: and nothing else is meanwhile."""
        self.append({"pulled": list(rows), **({"alone": True} if alone else {})})

    def sync(self) -> None:
        """What was appended reaches the disk now; harmless on a closed journal."""
        with self._lock:
            if not self._handle.closed:
                self._sync()

    def _sync(self) -> None:
        os.fsync(self._handle.fileno())
        self._synced = time.monotonic()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._lock:
            try:
                os.fsync(self._handle.fileno())
            finally:
                self._handle.close()


def as_line(record: dict[str, Any]) -> bytes:
    """A record as a journal holds it."""
    body = json.dumps(record, ensure_ascii=True, separators=(",", ":")).encode("ascii")
    return b"%08x %b\n" % (zlib.crc32(body), body)


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """The whole records of a journal; torn and damaged lines are left out."""
    with path.open("rb") as handle:
        for line in handle:
            body = line[9:].rstrip(b"\n")
            if not line.endswith(b"\n") or line[8:9] != b" ":
                continue
            try:
                sound = int(line[:8], 16) == zlib.crc32(body)
            except ValueError:
                continue
            if sound:
                yield json.loads(body)
