"""Who works on a shard, and whether it still does.

attempt.json says who: job, host, process. The heartbeat says how far it is; a thread writes it
every 15 seconds. When the attempt ends, in whatever way it can notice, the heartbeat is renamed to
`ended-<how>`: that needs no disk space, so that a full disk is not taken for a death. An attempt
with a heartbeat and no living process has died.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from types import TracebackType

from medtrain.errors import DataError
from medtrain.files import read_sealed, sealed, write_bytes
from medtrain.shards.failures import write_failure
from medtrain.shards.shard_files import AttemptFiles

BEAT_EVERY_S = 15.0
STALE_AFTER_S = 60.0
"""Without a sign of life for this long, an attempt on another host counts as dead."""


@dataclass(frozen=True, slots=True)
class AttemptMark:
    """Who works on a shard."""

    attempt: str
    plan_id: str
    batch_size: int
    job: str
    """Slurm's job id (each task of an array has its own), or empty."""
    restart: int
    """How often Slurm requeued that job."""
    host: str
    process_space: str
    """Processes with the same value see each other by their numbers."""
    pid: int
    process_started: str
    """Tells two processes of one number apart."""
    gpus: int
    started_at: float

    @classmethod
    def mine(cls, plan_id: str, batch_size: int) -> AttemptMark:
        """The mark of a new attempt by this process; its name is job, restart, random part."""
        host, pid = socket.gethostname(), os.getpid()
        job = os.environ.get("SLURM_JOB_ID", "")
        restart = _number("SLURM_RESTART_COUNT")
        _, process_started = _process(pid)
        return cls(
            attempt=f"{job or f'{host}-{pid}'}.{restart}.{uuid.uuid4().hex[:8]}",
            plan_id=plan_id,
            batch_size=batch_size,
            job=job,
            restart=restart,
            host=host,
            process_space=_process_space(host),
            pid=pid,
            process_started=process_started,
            gpus=_number("SLURM_GPUS_ON_NODE"),
            started_at=time.time(),
        )

    @classmethod
    def read(cls, files: AttemptFiles) -> AttemptMark | None:
        """The mark of an attempt; None where there is none that can be trusted."""
        try:
            tree = read_sealed(files.mark)
            return cls(**{field.name: tree[field.name] for field in fields(cls)})
        except (OSError, DataError, KeyError):
            return None

    def write(self, files: AttemptFiles) -> None:
        """Put it where `read` finds it."""
        write_bytes(files.mark, sealed(asdict(self)))

    def is_alive(self, beat_age_s: float, me: AttemptMark | None = None) -> bool:
        """Whether the process of an attempt without an end mark still works on it.

        Args:
            beat_age_s: since its last sign of life.
            me: the attempt that asks. Slurm restarts a job after its end only, so an attempt of an
                earlier start of the same job is dead, however fresh its heartbeat is.
        """
        if me is not None and me.job and me.job == self.job and me.restart > self.restart:
            return False
        if self.process_space == _process_space(socket.gethostname()):
            alive, started = _process(self.pid)
            return alive and started == self.process_started
        return beat_age_s < STALE_AFTER_S


@dataclass(slots=True)
class Beat:
    """How far an attempt is; times are of its own clock, in seconds since the epoch."""

    rows: int = 0
    """Finished rows of the shard, those of earlier attempts included."""
    new: int = 0
    """Rows that this attempt finished."""
    errors: int = 0
    """Of the finished rows."""
    working_since: float | None = None
    """When the first batch was pulled."""
    last_row_at: float | None = None
    at: float = 0.0

    @classmethod
    def read(cls, path: Path) -> Beat | None:
        """The beat in a file; None where it cannot be read."""
        try:
            tree = json.loads(path.read_bytes())
            return cls(**{field.name: tree[field.name] for field in fields(cls)})
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, path: Path) -> None:
        """Replace the file; a torn one is never seen."""
        temporary = path.with_name(f".tmp-{path.name}")
        temporary.write_text(json.dumps(asdict(self)), encoding="ascii")
        temporary.replace(path)


class Heartbeat:
    """As a context: shows that an attempt is alive, and leaves word of how it ended."""

    def __init__(self, files: AttemptFiles, mark: AttemptMark, shard: int) -> None:
        self.beat = Beat()
        """The owner keeps it up to date."""
        self._files, self._mark, self._shard = files, mark, shard
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="heartbeat")

    def __enter__(self) -> Heartbeat:
        self._mark.write(self._files)
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()
        ended = "finished" if error is None else "interrupted"
        if isinstance(error, Exception):
            write_failure(self._shard, self._files, error)
            ended = "failed"
        with suppress(OSError):
            self._write()
        # The stage may have been laid out anew meanwhile: then this attempt's directory is gone.
        with suppress(FileNotFoundError):
            self._files.heartbeat.rename(self._files.ended(ended))

    def _run(self) -> None:
        while not self._over.wait(BEAT_EVERY_S):
            # A full disk is for the thread that writes rows to report.
            with suppress(OSError):
                os.utime(self._files.heartbeat)
                self._write()

    def _write(self) -> None:
        replace(self.beat, at=time.time()).write(self._files.heartbeat)


def beat_age_s(files: AttemptFiles, now: float) -> float:
    """Seconds since an attempt's last sign of life."""
    try:
        return now - files.heartbeat.stat().st_mtime
    except FileNotFoundError:
        return float("inf")


def _number(variable: str) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else 0


@cache
def _process_space(host: str) -> str:
    """Host, boot and process number space: containers of one host number their own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{host} {boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return host


def _process(pid: int) -> tuple[bool, str]:
    """Whether a process lives, and when it began, as the kernel counts (proc(5), stat)."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2]
    except FileNotFoundError:
        return not Path("/proc/self/stat").exists() and _answers(pid), ""
    except (OSError, UnicodeDecodeError):
        return True, ""
    state, started = after_name.split()[0], after_name.split()[19]
    return state not in "ZX", started


def _answers(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
