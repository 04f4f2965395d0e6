"""Having Slurm run the job at hand again."""

from __future__ import annotations

import os
import subprocess

from medtrain.cluster.slurm import Slurm, SlurmUnreachableError

_TIMEOUT_S = 60.0


def requeue(max_requeues: int) -> bool:
    """Queue this very job or array task again; False where it has been often enough, or cannot be.

    A shard that is not requeued is missing when its array is collected, and repaired then.
    """
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}") for name in ("JOB_ID", "TASK_ID"))
    job = f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID")
    if job is None or restarts >= max_requeues:
        print(f"Not queued again: {restarts} restarts so far, {max_requeues} allowed", flush=True)
        return False
    if _is_being_ended(job):
        print("Not queued again: Slurm is ending this job", flush=True)
        return False
    print(f"Saved, and queued again after {restarts} restarts", flush=True)
    try:
        done = subprocess.run(["scontrol", "requeue", job], timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        print(f"scontrol requeue has not answered for {_TIMEOUT_S:g} s", flush=True)
        return False
    return done.returncode == 0


def _is_being_ended(job: str) -> bool:
    """Whether somebody cancelled it: then it stays so."""
    try:
        return any(task.state != "RUNNING" for task in Slurm().queue([job]))
    except SlurmUnreachableError:
        return False
