"""A launch from its start to its end: signals, and the exit code that is meant.

SIGTERM, SIGUSR1, SIGUSR2 → a file on the node's own disk that the processes look for → they save
together and end with 75, however long that takes. A signal that comes again later, or Ctrl-C, ends
them at once; in a Slurm job it does not, since Slurm kills what has not ended in time, and signals
nodes that still save when another one is done.

The launcher below (torchrun, accelerate) never hears those signals: it would kill its processes
30 s later. It runs in a session of its own, so that a terminal's or Slurm's signal to a process
group does not reach it, and ignores them, since Slurm also signals every process of a step. It is
killed when this process is, and the processes when it is (worker.py).
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any

from medtrain.environment import STOP_FILE_VARIABLE
from medtrain.errors import StoppedError
from medtrain.launch.worker import end_with_parent

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
SAME_REQUEST_S = 10.0
"""One request to stop comes several times: Slurm signals every process of a job, and srun passes on
what it gets."""
_END_WAIT_S = 40.0
"""torchrun gives its processes 30 s after an interrupt."""


class _EndNowError(BaseException):
    """Raised by a later signal in the middle of waiting."""


class Processes:
    """A command, with the signals of this process turned into a request to stop."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], stderr: IO[bytes] | None
    ) -> None:
        self._command, self._stderr = command, stderr
        self._environment = dict(environment)
        self._asked_at: float | None = None

    @property
    def were_asked_to_stop(self) -> bool:
        """Whether a signal asked for it."""
        return self._asked_at is not None

    def run(self) -> int:
        """The command's exit code; negative: the signal that ended it.

        Raises:
            StoppedError: it was told to stop a second time, and ended before it had saved.
            KeyboardInterrupt: Ctrl-C; everything has ended.
        """
        with tempfile.TemporaryDirectory(prefix="medtrain-") as directory:
            self._stop_file = Path(directory) / "stop"
            before = {number: signal.signal(number, self._told) for number in STOP_SIGNALS}
            try:
                return self._run()
            except _EndNowError:
                raise StoppedError(
                    "The training was told to stop a second time, before it had saved",
                    fix="The same command goes on from the last checkpoint.",
                ) from None
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    def _run(self) -> int:
        child = subprocess.Popen(
            self._command,
            env={**self._environment, STOP_FILE_VARIABLE: str(self._stop_file)},
            stderr=self._stderr,
            start_new_session=True,
            preexec_fn=_become_child,
        )
        try:
            return child.wait()
        except BaseException:
            end_now(child)
            raise

    def _told(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
            self._stop_file.touch()
        elif now - self._asked_at > SAME_REQUEST_S and "SLURM_JOB_ID" not in os.environ:
            raise _EndNowError


def _become_child() -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(signal.SIGKILL)


def end_now(child: subprocess.Popen[Any]) -> None:
    """Interrupt a command and what it started; kill what does not end."""
    try:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGINT)
        child.wait(_END_WAIT_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt, _EndNowError):
        pass
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
