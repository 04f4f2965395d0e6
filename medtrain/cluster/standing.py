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


def newest_with(run: Run, step: Step) -> Submission | None:
    """The newest submission that has a step."""
    found = [s for s in Ledger(run).all() if step in s.steps]
    return found[-1] if found else None


def was_opened(run: Run, step: Step) -> bool:
    """Whether the newest job that was to open a phase has done so."""
    opening: Step = ("open", step[1], step[2])
    newest = newest_with(run, opening)
    return newest is not None and step_mark(run, newest, newest.steps.index(opening)).exists()


def done_steps(run: Run) -> set[Step]:
    """Steps that the newest job with them has done."""
    newest = {
        step: (submission, number)
        for submission in Ledger(run).all()
        for number, step in enumerate(submission.steps)
    }
    done = {step for step, (s, number) in newest.items() if step_mark(run, s, number).exists()}
    return done | {("shards", stage, phase) for verb, stage, phase in done if verb == "close"}


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
