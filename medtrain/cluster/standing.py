"""Which submitted jobs can still do what they were submitted for.

A job whose predecessor failed or was cancelled waits for ever, or, where it waits for the end of an
array and not for success, begins with nothing to do. Slurm takes seconds to clear up behind a job;
whoever submits again must not count on the rest.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from medtrain.cluster.ledger import Ledger, Step, Submission
from medtrain.pipeline import Pipeline
from medtrain.run import Run
from medtrain.stages import by_name


def step_mark(run: Run, submission: Submission, number: int) -> Path:
    """The file that says that a step of a submission was done."""
    return run.job_folder(submission.key, submission.number) / f"step.{number}.done"


def was_opened(run: Run, closing: Submission, step: Step) -> bool:
    """Whether a job of the same chain has opened the phase that a step closes."""
    return ("open", step[1], step[2]) in done_steps(run, closing.chain)


def done_steps(run: Run, chain: str) -> set[Step]:
    """Steps that jobs of a chain have done. What an older chain did may have been undone."""
    done = {
        step
        for submission in Ledger(run).all()
        if submission.chain == chain
        for number, step in enumerate(submission.steps)
        if step_mark(run, submission, number).exists()
    }
    return done | {("shards", stage, phase) for verb, stage, phase in done if verb == "close"}


def forget_steps(run: Run, stage: str) -> None:
    """Have no step of a stage count as done: it begins anew."""
    for submission in Ledger(run).all():
        for number, step in enumerate(submission.steps):
            if step[1] == stage:
                step_mark(run, submission, number).unlink(missing_ok=True)


def doomed(pipeline: Pipeline, alive: Sequence[Submission]) -> list[Submission]:
    """Of the jobs that are queued or run, those that wait for something that will not come."""
    view = _View(pipeline, alive)
    return [submission for submission in alive if not view.is_sound(submission)]


class _View:
    """The newest submission of every key, and what became of it."""

    def __init__(self, pipeline: Pipeline, alive: Collection[Submission]) -> None:
        self._pipeline = pipeline
        self._latest = Ledger(pipeline.run).latest()
        self._alive = {(s.key, s.number) for s in alive}

    def is_sound(self, submission: Submission) -> bool:
        """Whether all it waits for has been done or is still coming."""
        return all(self._comes(key) for key, _ in submission.after)

    def _comes(self, key: str) -> bool:
        before = self._latest.get(key)
        if before is None:
            return False
        if (before.key, before.number) in self._alive:
            return self.is_sound(before)
        return self._was_done(before)

    def _was_done(self, submission: Submission) -> bool:
        if submission.is_array:
            # What it left undone is repaired by the job behind it, if it could begin at all.
            return all(self._comes(key) for key, _ in submission.after)
        if submission.steps[0][0] == "train":
            return self._pipeline.standing(by_name(submission.stages[0])).state == "done"
        run = self._pipeline.run
        return all(step_mark(run, submission, n).exists() for n in range(len(submission.steps)))
