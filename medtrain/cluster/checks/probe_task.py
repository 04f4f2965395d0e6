"""Inside the probe job: one task's look at its node, as one JSON file.

request.json (from the login node) → this host, its Python and directories → whether a lock held on
the login node is seen → whether jobs may submit jobs → all-reduce and a race for hard links with
the other task → task.<rank>.json → wait for the signal that announces the time limit →
signal.<rank>.json.

    python -m medtrain.cluster.checks.probe_task DIRECTORY
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import medtrain
from medtrain.cluster.checks.all_reduce import DEADLINE_S, start_rank
from medtrain.cluster.checks.asking import ask
from medtrain.files import read_json, write_json

LINK_RACES = 50
SIGNAL = signal.SIGUSR1


class SignalClock:
    """When the signal arrived, in seconds since this process began."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._arrived = threading.Event()
        self.after_s: float | None = None
        signal.signal(SIGNAL, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.after_s is None:
            self.after_s = time.monotonic() - self._began
            self._arrived.set()

    def wait_until(self, age_s: float) -> None:
        """Wait for the signal until this process is that old."""
        self._arrived.wait(max(age_s - (time.monotonic() - self._began), 0.0))


def main() -> None:
    """Look, tell, and wait for the signal."""
    clock = SignalClock()
    directory = Path(sys.argv[1])
    rank = int(os.environ["SLURM_PROCID"])
    request = read_json(directory / "request.json")
    found = look(directory, rank, request)
    write_json(directory / f"task.{rank}.json", found)
    clock.wait_until(request["signal_wait_s"])
    write_json(directory / f"signal.{rank}.json", {"after_s": clock.after_s})


def look(directory: Path, rank: int, request: dict[str, Any]) -> dict[str, Any]:
    """Everything but the signal."""
    seen = directory / f"seen.{rank}"
    before = time.time()
    seen.touch()
    world = int(os.environ["SLURM_NTASKS"])
    found = {
        "host": socket.gethostname(),
        "python": sys.executable,
        "package": str(Path(medtrain.__file__).parent),
        "now": before,
        "server_ahead_s": seen.stat().st_mtime - before,
        "lock_is_shared": _is_locked(directory / "lock"),
        "missing": [path for path in request["paths"] if not Path(path).exists()],
        "gpus": ask("nvidia-smi", "-L").out.splitlines(),
        "visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }
    if rank == 0:
        # The environment of this job would speak for the new one too.
        answer = ask(*request["submit"], environment=without_job_variables())
        found["submits"] = "" if answer.ok else answer.complaint
    port = 20_000 + int(os.environ["SLURM_JOB_ID"]) % 20_000
    head = os.environ["MEDTRAIN_PROBE_HEAD"]
    with start_rank(rank, world, head, port) as child:
        found["all_reduce"] = child.result(DEADLINE_S)._asdict()
    found["links_won"] = links_won(directory, rank)
    return found


def _is_locked(path: Path) -> bool:
    with path.open("r+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False  # no locks at all
    return False


def links_won(directory: Path, rank: int) -> int | None:
    """How many of the names this task was the first to take; None without hard links."""
    mine = directory / f"racer.{rank}"
    mine.touch()
    won = 0
    for number in range(LINK_RACES):
        try:
            with suppress(FileExistsError):
                os.link(mine, directory / f"race.{number}")
                won += 1
        except OSError:
            return None
    return won


def without_job_variables(keep: Sequence[str] = ("SLURM_CONF",)) -> dict[str, str]:
    """This environment, less what Slurm tells a job about itself."""
    return {
        name: value
        for name, value in os.environ.items()
        if name in keep or not name.startswith("SLURM_")
    }


if __name__ == "__main__":
    main()
