"""Work in processes of its own, that can be killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_START = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from shards.sets import requests, square, run
def work(batches):
    for batch in {batches}:
        {before}
        for pair in square([batch]):
            time.sleep({row_s})
            yield pair
run(Path({directory!r}), requests({count}), work, **{layout!r})
"""

POISON = "if any(r.id in {rows!r} for r in batch): os.kill(os.getpid(), signal.SIGKILL)"


def start(
    directory: Path,
    count: int,
    *,
    before: str = "pass",
    row_s: float = 0.0,
    read_ahead: bool = False,
    **layout: int,
) -> subprocess.Popen[bytes]:
    """A process that brings `count` rows; `before` is a statement that goes before each batch."""
    code = _START.format(
        tests=str(Path(__file__).parents[1]),
        batches="list(batches)" if read_ahead else "batches",
        before=before,
        row_s=row_s,
        directory=str(directory),
        count=count,
        layout=layout,
    )
    return subprocess.Popen([sys.executable, "-c", code])
