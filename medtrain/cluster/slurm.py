"""The questions that a run's jobs raise, put to Slurm (submitting is submitit's business, and the
doctor has questions of its own).

squeue --states=all → what waits, runs, and has ended in the last minutes (slurmctld's memory)
sacct -D            → every incarnation of every job, where the site keeps accounts
scontrol, scancel   → dependencies, limits, cancelling
One call answers for any number of jobs. Who asks gets an answer or SlurmUnreachableError within
seconds; what a site or a user has set to change the commands' output is left out.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable

from medtrain.cluster.queue_state import (
    HISTORY_FORMAT,
    QUEUE_FORMAT,
    Incarnation,
    TaskState,
    parse_history,
    parse_queue,
)
from medtrain.errors import MedtrainError, TryAgainError

TIMEOUT_S = 15.0
_HISTORY_RETRY_S = 60.0
_NO_SUCH_JOB = re.compile(r"invalid job id", re.IGNORECASE)
_OVER = re.compile(r"invalid job id|already (finished|completed|completing)", re.IGNORECASE)
_NO_ACCOUNTS = re.compile(r"accounting storage is disabled", re.IGNORECASE)
# Variables that change what the commands print or whom they print it about.
_FOREIGN = ("SQUEUE_", "SACCT_", "SCONTROL_", "SCANCEL_")


class SlurmUnreachableError(TryAgainError):
    """Slurm does not answer; jobs go on meanwhile."""


class Slurm:
    """Questions to Slurm, and the few things that are changed there."""

    def __init__(self, *, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._max_array_size: int | None = None
        self._no_history_until = 0.0

    def is_available(self) -> bool:
        """Whether this machine has Slurm's commands."""
        return shutil.which("squeue") is not None

    def can_submit(self) -> bool:
        """Whether this machine has sbatch."""
        return shutil.which("sbatch") is not None

    def queue(self, job_ids: Iterable[str]) -> list[TaskState]:
        """What waits and runs of these jobs, and what ended so lately that Slurm still knows it.

        Raises:
            SlurmUnreachableError: Slurm does not answer.
        """
        wanted = sorted(set(job_ids))
        if not wanted:
            return []
        # Of a single unknown id squeue makes an error, of several it says nothing.
        return parse_queue(self._squeue(f"--jobs={','.join(wanted)}", allow=_NO_SUCH_JOB))

    def queue_by_comment(self, prefix: str) -> list[TaskState]:
        """The same for all jobs of this user whose comment begins so.

        Raises:
            SlurmUnreachableError: Slurm does not answer.
        """
        found = parse_queue(self._squeue(f"--user={os.getuid()}"))
        return [task for task in found if task.comment.startswith(prefix)]

    def history(self, job_ids: Iterable[str]) -> list[Incarnation] | None:
        """Every incarnation of these jobs; None where no accounts are kept or can be reached."""
        wanted = sorted(set(job_ids))
        if time.monotonic() < self._no_history_until or shutil.which("sacct") is None:
            return None
        if not wanted:
            return []
        command = ["sacct", "--duplicates", "--allocations", "--noheader", "--parsable2",
                   f"--format={HISTORY_FORMAT}", f"--jobs={','.join(wanted)}"]  # fmt: skip
        try:
            return parse_history(self._run(command))
        except SlurmUnreachableError as error:
            # Where there is none it stays so; a database that is down is asked again later.
            forever = _NO_ACCOUNTS.search(error.message) is not None
            pause = float("inf") if forever else _HISTORY_RETRY_S
            self._no_history_until = time.monotonic() + pause
            return None

    def cancel(self, job_ids: Iterable[str]) -> None:
        """Cancel jobs, arrays (`123`) or array tasks (`123_4`); those that are over stay as they
        are.

        Raises:
            SlurmUnreachableError: Slurm does not answer, or refuses.
        """
        wanted = list(job_ids)
        if wanted:
            self._run(["scancel", *wanted], allow=_OVER)

    def set_dependency(self, job_id: str, dependency: str) -> None:
        """Make a pending job wait for something else, such as `afterok:12,afterany:13`.

        Raises:
            MedtrainError: it does not wait any more.
            SlurmUnreachableError: Slurm does not answer.
        """
        command = ["scontrol", "update", f"JobId={job_id}", f"Dependency={dependency}"]
        try:
            self._run(command)
        except SlurmUnreachableError as error:
            if re.search(r"no longer pending|invalid job id|finished", error.message, re.I):
                raise MedtrainError(
                    f"Job {job_id} does not wait any more, so it cannot be made to wait for "
                    f"{dependency}"
                ) from error
            raise

    def max_array_size(self) -> int:
        """Array indices must be lower than this.

        Raises:
            SlurmUnreachableError: Slurm does not answer.
        """
        if self._max_array_size is None:
            shown = self._run(["scontrol", "show", "config"])
            found = re.search(r"^MaxArraySize\s*=\s*(\d+)", shown, re.MULTILINE)
            self._max_array_size = int(found[1]) if found else 1001
        return self._max_array_size

    def _squeue(self, which: str, allow: re.Pattern[str] | None = None) -> str:
        return self._run(
            ["squeue", "--noheader", "--states=all", f"--Format={QUEUE_FORMAT}", which], allow=allow
        )

    def _run(self, command: list[str], allow: re.Pattern[str] | None = None) -> str:
        """Its standard output.

        Raises:
            SlurmUnreachableError: it is not there, takes too long, or ends with an error that
                `allow` does not match.
        """
        program = command[0]
        try:
            done = subprocess.run(
                command,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=self._timeout_s,
            )
        except subprocess.TimeoutExpired:
            raise unreachable(f"{program} has not answered for {self._timeout_s:g} s") from None
        except OSError as error:
            raise unreachable(f"{program} cannot be run: {error.strerror}") from error
        if done.returncode and not (allow and allow.search(done.stderr)):
            said = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
            raise unreachable(f"{program} says: {said[0]}")
        return done.stdout


def unreachable(what: str) -> SlurmUnreachableError:
    """The error for a command that got no answer."""
    return SlurmUnreachableError(
        f"Slurm does not answer: {what}",
        fix="Jobs that run go on. Try again in a minute, on a login node of the cluster.",
    )


def _environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(_FOREIGN)}
    # 0: squeue writes the waiting tasks of an array in full and not only the first 64 characters.
    return {**kept, "SLURM_BITSTR_LEN": "0", "SLURM_TIME_FORMAT": "standard", "LC_ALL": "C"}
