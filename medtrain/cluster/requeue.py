"""Having Slurm run the job at hand again."""

from __future__ import annotations

import os
import shutil
import subprocess
import time

from medtrain.cluster.slurm import Slurm, SlurmUnreachableError
from medtrain.errors import TryAgainError

_TIMEOUT_S = 60.0
_UNTIL_KILLED_S = 120.0
REQUEUE_EXIT_CODE = 85
"""What a task ends with that has to run again and cannot say so to Slurm."""


def requeue(max_requeues: int) -> int:
    """Queue this very job or array task again; the exit code to end with.

    A shard that is not requeued is missing when its array is collected, and repaired then.
    """
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    job = _this_job()
    if job is None or restarts >= max_requeues:
        print(f"Not queued again: {restarts} restarts so far, {max_requeues} allowed", flush=True)
        return TryAgainError.exit_code
    if shutil.which("scontrol") is None:  # in a container; the batch script outside does it
        return REQUEUE_EXIT_CODE
    if is_being_ended():
        print("Slurm is ending this job, and knows whether it is to run again", flush=True)
        # To end now would make a failure of a preemption.
        time.sleep(_UNTIL_KILLED_S)
        return TryAgainError.exit_code
    try:
        subprocess.run(["scontrol", "requeue", job], timeout=_TIMEOUT_S, check=True)
        print(f"Saved, and queued again after {restarts} restarts", flush=True)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"Not queued again: {error}", flush=True)
    return TryAgainError.exit_code


def requeue_lines(max_requeues: int) -> list[str]:
    """The end of a batch script, which queues the job again for a task that cannot."""
    return [
        "code=$?",
        f'if [ "$code" -eq {REQUEUE_EXIT_CODE} ] && '
        f'[ "${{SLURM_RESTART_COUNT:-0}}" -lt {max_requeues} ]; then',
        '  scontrol requeue "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}'
        '${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"',
        "fi",
        'exit "$code"',
    ]


def is_being_ended() -> bool:
    """Whether somebody cancelled this job: then it stays so, and starts nothing new."""
    job = _this_job()
    try:
        return job is not None and any(t.state != "RUNNING" for t in Slurm().queue([job]))
    except SlurmUnreachableError:
        return False


def _this_job() -> str | None:
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}") for name in ("JOB_ID", "TASK_ID"))
    return f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID")
