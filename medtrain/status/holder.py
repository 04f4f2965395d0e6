"""Who works in a run directory on some machine: the process that holds its lock.

The lock is the kernel's, so that a killed process holds nothing; what it wrote into the lock file
stays, and is believed only while the lock is held.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
from pathlib import Path

from medtrain.run import Run

_HOLDER = re.compile(r"^process (?P<pid>\d+) on (?P<host>\S+)$")


def living_holder(run: Run) -> str:
    """`process 12 on host` of the process that holds the run's lock; empty if there is none."""
    for lock in run.lock_files:
        if holder := _holder(lock):
            return holder
    return ""


def _holder(lock: Path) -> str:
    try:
        with lock.open("rb") as handle:
            said = handle.read(200).decode(errors="replace").strip()
            match = _HOLDER.match(said)
            # Trying the lock takes it for a moment, in which a new `medtrain run` would be refused:
            # it is not tried where the process is known to be gone.
            if match is None or _is_gone(match["host"], int(match["pid"])):
                return ""
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return said
    except OSError:
        # No such file, not ours to read, or a file system without locks: nothing is known.
        return ""
    return ""


def _is_gone(host: str, pid: int) -> bool:
    if host != socket.gethostname():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
