"""What slurm/train.sbatch runs on a job's first node: one task a node, and the job's own exit code.

srun → `medtrain STAGE CONFIG` on every node, which starts that node's processes (launcher.py) →
exit code. USR1 (time is running out) and TERM end the step and have the job queued again; so does a
training that itself ends with 75.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

from medtrain.cluster.requeue import requeue
from medtrain.cluster.steps import failure_noted
from medtrain.config import RunConfig
from medtrain.console import Console
from medtrain.endpoint import load_secrets
from medtrain.errors import MedtrainError, TryAgainError, from_exit_code
from medtrain.launcher import IN_JOB_VARIABLE
from medtrain.lineage import Lineage
from medtrain.pipeline import Pipeline
from medtrain.run import Run
from medtrain.stages import by_name

_STEP_STOPS_WITHIN_S = 60.0


class _TimeIsOverError(BaseException):
    """Raised by a signal in the middle of waiting."""


def train_job(run: Run, config: RunConfig, stage: str, arguments: Sequence[str]) -> None:
    """Run a training stage on all nodes of this job.

    Args:
        run: the run.
        config: its configuration.
        stage: `sft` or `dpo`.
        arguments: CONFIG and overrides, as they were given to the batch script.

    Raises:
        MedtrainError: the training's own error, with its exit code; TryAgainError where the job was
            queued again.
    """
    Lineage(run).forget_failure(stage)
    with failure_noted(run, stage):  # once, and not by every node
        load_secrets(config.cluster.secrets_file)
        Pipeline(run, config, Console(quiet=True)).check_before(by_name(stage))
    environment = {**os.environ, IN_JOB_VARIABLE: "1"}
    step = subprocess.Popen(srun_command(config, [stage, *arguments]), env=environment)
    code = _wait(step)
    if code is None:
        requeue(config.cluster.max_requeues)
        raise TryAgainError(f"{stage} was stopped before its time limit; it goes on from its last "
                            "checkpoint")  # fmt: skip
    if code == 0:
        return
    # srun reports the highest code of its tasks, and a task that was killed because another one
    # failed has a high one.
    failure = Lineage(run).failure(stage)
    if failure is not None:
        code = failure["exit_code"]
    if code in (TryAgainError.exit_code, 128 + signal.SIGTERM):
        requeue(config.cluster.max_requeues)
    if failure is not None:
        raise from_exit_code(code, failure["message"], failure["fix"])
    raise _other(stage, code)


def srun_command(config: RunConfig, arguments: Sequence[str]) -> list[str]:
    """One task a node, all of them ended when one of them fails."""
    cluster = config.cluster
    nodes = os.environ.get("SLURM_JOB_NUM_NODES", "1")
    cores = os.environ.get("SLURM_CPUS_PER_TASK")
    command = ["srun", "--kill-on-bad-exit=1", f"--nodes={nodes}",
               f"--ntasks={nodes}", "--ntasks-per-node=1"]  # fmt: skip
    # srun does not take over the batch job's cores by itself.
    command += [f"--cpus-per-task={cores}"] if cores else []
    command += [*cluster.srun, *shlex.split(cluster.container or "")]
    return [*command, cluster.python or sys.executable, "-m", "medtrain", *arguments]


def _wait(step: subprocess.Popen[bytes]) -> int | None:
    """The step's exit code; None where this job was told to stop, and the step has been stopped."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TimeIsOverError

    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        return step.wait()
    except _TimeIsOverError:
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        for end in (step.terminate, step.kill):
            end()
            with suppress(subprocess.TimeoutExpired):
                step.wait(_STEP_STOPS_WITHIN_S)
                break
        return None


def _other(stage: str, code: int) -> MedtrainError:
    killed = f" (signal {code - 128})" if code > 128 else ""
    return from_exit_code(
        code,
        f"{stage} ended with exit code {code}{killed}",
        "What it said is above, and in logs/ of the run. Submitted again, it goes on from its last "
        "checkpoint.",
    )
