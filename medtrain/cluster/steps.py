"""What the short jobs between arrays do: run stages, open arrays, close them, have them repaired.

open    mark the stage as begun, settle the plans of the phase
run     a stage in this process
close   collect the phase; of the last phase, finish the stage. Where shards are missing, submit
        them again with a new job like this one behind them, move the jobs that wait for this one
        onto that, and leave
Steps are safe to run again: what is finished is skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from medtrain.cluster.chain import is_last_phase, phase_of
from medtrain.cluster.ledger import Step, Submission
from medtrain.cluster.repair import repair
from medtrain.cluster.standing import step_mark, was_opened
from medtrain.config import RunConfig
from medtrain.console import Console
from medtrain.errors import TryAgainError, as_medtrain_error
from medtrain.lineage import Lineage
from medtrain.pipeline import Pipeline
from medtrain.run import Run
from medtrain.shards import CollectOnly, UnsoundShardError, open_phase
from medtrain.stages import by_name

LOCK_WAIT_S = 600.0
"""A node that died may hold the run's lock until its file server notices."""


def run_steps(run: Run, config: RunConfig, console: Console, submission: Submission) -> None:
    """Do a job's steps in order.

    Raises:
        MedtrainError: a step failed; those before it stand.
    """
    with run.lock(wait_s=LOCK_WAIT_S):
        for number, step in enumerate(submission.steps):
            with failure_noted(run, step[1]):
                try:
                    run_step(run, config, console, step)
                    step_mark(run, submission, number).touch()
                except UnsoundShardError as error:
                    if step[0] != "close":
                        raise
                    console.warn("shards_missing", error.message, stage=step[1])
                    repair(run, config, console, submission, step)
                    return


def check_begun(run: Run, submission: Submission) -> None:
    """End a job whose array never began: it waited for an end of that, and not for success.

    Raises:
        TryAgainError: a job before it failed or was cancelled.
    """
    for step in submission.steps:
        if step[0] == "close" and not was_opened(run, submission, step):
            raise TryAgainError(
                f"{step[2]} of {step[1]} were never begun: a job before this one failed or was "
                "cancelled",
                fix=f"medtrain resume {run.root}",
            )


@contextmanager
def failure_noted(run: Run, stage: str) -> Iterator[None]:
    """Keep an error that ends a job where `medtrain status` finds it, unless it is kept already."""
    try:
        yield
    except Exception as error:
        Lineage(run).record_failure(stage, as_medtrain_error(error))
        raise


def run_step(run: Run, config: RunConfig, console: Console, step: Step) -> None:
    """Do one step.

    Raises:
        UnsoundShardError: shards of a phase that is to be closed are missing.
    """
    verb, name, _ = step
    stage, pipeline = by_name(name), Pipeline(run, config, console)
    if verb == "run":
        pipeline.bring(stage)
    elif verb == "open":
        _open(run, config, pipeline, step)
    elif is_last_phase(step, config):
        pipeline.bring(stage, drive=CollectOnly(config.cluster.look_again_s))
    else:
        with phase_of(step).open(run, config) as phase:
            CollectOnly(config.cluster.look_again_s)(phase, console)


def _open(run: Run, config: RunConfig, pipeline: Pipeline, step: Step) -> None:
    stage = by_name(step[1])
    first = stage.active_phases(config)[0].name == step[2]
    if first and not pipeline.begin(stage):
        return
    with phase_of(step).open(run, config) as phase:
        open_phase(phase)
