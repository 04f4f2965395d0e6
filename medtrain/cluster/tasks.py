"""What a job executes: the callables that submitit carries, each a few words.

root, key and number of the submission → its steps and tasks, from the ledger → work → nothing: all
results are files. An error is one message in the job's log, a note beside it, and its exit code.
Every one of them may be run again at any moment, and at the same time as another.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from medtrain.cluster.ledger import Ledger, Submission
from medtrain.cluster.requeue import requeue
from medtrain.config import RunConfig, load_config
from medtrain.console import Console, quiet_libraries, show_error
from medtrain.endpoint import load_secrets
from medtrain.errors import DEBUG_VARIABLE, as_medtrain_error
from medtrain.files import write_json
from medtrain.kernel_cache import keep_compiled_kernels
from medtrain.run import Run
from medtrain.shards import attempt_units


class _Preempted(BaseException):
    """Time is over, or somebody else needs the node: not an error that anything may catch."""


@dataclass
class _Task(ABC):
    """A job of a run, by the name of its submission."""

    root: str
    key: str
    number: int

    def __call__(self) -> None:
        _sweep_temporaries()
        run = Run(Path(self.root))
        self._guarded(run, lambda: self._work(run, Ledger(run).one(self.key, self.number)))

    def checkpoint(self) -> NoReturn:
        """Called by submitit on the signal before the time limit or a preemption.

        The work is left where it is, journals are closed, and `__call__` has the job requeued.
        submitit would write the arguments anew instead, in two steps, and a kill between them would
        lose the task.
        """
        raise _Preempted

    @abstractmethod
    def _work(self, run: Run, submission: Submission) -> None:
        """Do what the submission says."""

    def _note_of_failure(self, run: Run) -> Path:
        return run.job_folder(self.key, self.number) / "failure.json"

    def _guarded(self, run: Run, work: Callable[[], None]) -> None:
        # submitit ignores it, and the kill that follows would look like the rows' fault.
        signal.signal(signal.SIGTERM, _terminate)
        try:
            work()
        except _Preempted:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise SystemExit(requeue(load_config(run.config).cluster.max_requeues)) from None
        except Exception as error:
            if os.environ.get(DEBUG_VARIABLE):
                traceback.print_exc()
            known = as_medtrain_error(error)
            show_error(known.message, known.fix)
            note: dict[str, Any] = {
                "exit_code": known.exit_code, "message": known.message, "fix": known.fix,
                "host": _node_name(),
            }  # fmt: skip
            try:
                write_json(self._note_of_failure(run), note)
            except OSError as full:
                print(f"The note of this failure cannot be written: {full}", file=sys.stderr)
            # Not an exception: submitit would keep its traceback, and what stands in it, in a file.
            raise SystemExit(known.exit_code) from None


@dataclass
class ShardTask(_Task):
    """One task of an array."""

    task: int

    def _work(self, run: Run, submission: Submission) -> None:
        from medtrain.cluster.chain import phase_of

        config, _ = open_run(run)
        # Into the job's own log: a thousand tasks in the run's would be too many.
        console = Console()
        units = submission.tasks[self.task]
        shards = " ".join(f"{key}:{shard}" for key, shard in units)
        console.event("shards_start", task=self.task, shards=shards, host=_node_name())
        with phase_of(submission.steps[0]).open(run, config) as phase:
            attempt_units(phase, units, console)
        console.event("shards_done", task=self.task, shards=shards)

    def _note_of_failure(self, run: Run) -> Path:
        return run.job_folder(self.key, self.number) / f"failure.{self.task}.json"


@dataclass
class ChainTask(_Task):
    """A short job between arrays, or a stage of one process."""

    def _work(self, run: Run, submission: Submission) -> None:
        from medtrain.cluster.steps import check_begun, failure_noted, run_steps

        check_begun(run, submission)
        with failure_noted(run, submission.stages[0]):
            config, console = open_run(run)
        run_steps(run, config, console, submission)


def open_run(run: Run) -> tuple[RunConfig, Console]:
    """What every job begins with."""
    quiet_libraries()
    keep_compiled_kernels()
    config = load_config(run.config)
    load_secrets(config.cluster.secrets_file)
    return config, Console(run.log)


def _node_name() -> str:
    """As Slurm calls this node, which need not be what the node calls itself."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    # Once: journals are being closed.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Preempted


def _sweep_temporaries() -> None:
    """Take away what a kill left in the middle of submitit's writing: its temporary names are
    always the same, and one that is there makes every later write fail."""
    folder = os.environ.get("SUBMITIT_FOLDER")
    if not folder:
        return
    from submitit import JobEnvironment

    paths = JobEnvironment().paths
    for target in (paths.submitted_pickle, paths.result_pickle):
        target.with_suffix(target.suffix + ".save_tmp").unlink(missing_ok=True)
