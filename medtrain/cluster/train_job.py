"""What slurm/train.sbatch runs on a job's first node: one task a node, and the job's own exit code.

srun → `medtrain STAGE CONFIG` on every node, which starts that node's processes (medtrain.launch) →
exit code. USR1 (time is running out) and TERM are passed on to the tasks, whose processes save
together and end with 75. Then the job is queued again, unless the training got done in that time.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any, NamedTuple

from medtrain.cluster.requeue import requeue
from medtrain.cluster.steps import failure_noted
from medtrain.config import RunConfig
from medtrain.console import Console
from medtrain.endpoint import load_secrets
from medtrain.errors import MedtrainError, TryAgainError, from_exit_code, from_record
from medtrain.launch import IN_JOB_VARIABLE
from medtrain.lineage import Lineage
from medtrain.pipeline import Pipeline
from medtrain.run import Run
from medtrain.stages import by_name

_STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
_UNSAVED: dict[str, Any] = {
    "exit_code": TryAgainError.exit_code,
    "stopped": True,
    "message": "The training was stopped before it had saved",
    "fix": "It goes on from its last checkpoint.",
}


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
    step: subprocess.Popen[bytes] | None = None
    _raise_when_told_to_stop()
    try:
        with failure_noted(run, stage):  # once, and not by every node
            load_secrets(config.cluster.secrets_file)
            Pipeline(run, config, Console(quiet=True)).check_before(by_name(stage))
        environment = {**os.environ, IN_JOB_VARIABLE: "1"}
        step = subprocess.Popen(srun_command(config, [stage, *arguments]), env=environment)
        ended = _Ended(step.wait(), was_told=False)
    except _TimeIsOverError:
        ended = _stopped(step, config.cluster.signal_delay_s)
    if ended.code == 0:
        return
    # srun reports the highest code of its tasks, and a task that was killed because another one
    # failed has a high one.
    failure = Lineage(run).failure(stage) or (_UNSAVED if ended.was_told else None)
    code = ended.code if failure is None else failure["exit_code"]
    if code in (TryAgainError.exit_code, 128 + signal.SIGTERM):
        requeue(config.cluster.max_requeues)
    if failure is not None:
        raise from_record(failure)
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


class _Ended(NamedTuple):
    """How a job step came to its end."""

    code: int
    was_told: bool
    """This job was told to stop while the step ran."""


def _raise_when_told_to_stop() -> None:
    """The first signal raises, from now on; those after it change nothing."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in _STOP_SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise _TimeIsOverError

    for number in _STOP_SIGNALS:
        signal.signal(number, stop)


def _stopped(step: subprocess.Popen[bytes] | None, save_s: float) -> _Ended:
    """The end of a step that is told to stop; it has `save_s` seconds, about what the job has."""
    if step is None:  # before there was one
        return _Ended(128 + signal.SIGTERM, was_told=True)
    # srun passes this on to its tasks; TERM would have it kill them.
    step.send_signal(signal.SIGUSR1)
    try:
        return _Ended(step.wait(save_s), was_told=True)
    except subprocess.TimeoutExpired:
        step.kill()
        return _Ended(step.wait(), was_told=True)


def _other(stage: str, code: int) -> MedtrainError:
    killed = f" (signal {code - 128})" if code > 128 else ""
    return from_exit_code(
        code,
        f"{stage} ended with exit code {code}{killed}",
        "What it said is above, and in logs/ of the run. Submitted again, it goes on from its last "
        "checkpoint.",
    )
