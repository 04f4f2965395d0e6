"""The board: a run's status by its files, and over it what Slurm says of its jobs.

ledger → ids → one squeue and one sacct → for each stage its live and ended tasks → state, why it
waits, shards, requeues, GPU-hours, tasks that show no sign of life
Files are trusted first: what they call done is done, whatever became of the job. While Slurm does
not answer, its last answer stands.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from medtrain.cluster import gpu_hours
from medtrain.cluster.ledger import COMMENT_PREFIX, Ledger, Submission
from medtrain.cluster.queue_state import Incarnation, TaskState
from medtrain.cluster.slurm import Slurm, SlurmUnreachableError
from medtrain.cluster.stage_jobs import SILENT_AFTER_S, StageJobs
from medtrain.config import RunConfig
from medtrain.run import Run
from medtrain.stages import stages_of
from medtrain.status import GpuTime, RunStatus, StageStatus, run_status

HISTORY_EVERY_S = 30.0
"""Accounts are asked for no more often: it is a database of the whole site."""
_SILENT_PAUSE_S = 10.0
"""Between a question that was not answered and the next one."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What Slurm last said of a run's jobs."""

    submissions: tuple[Submission, ...] = ()
    tasks: tuple[TaskState, ...] = ()
    history: tuple[Incarnation, ...] | None = None


class Board:
    """Looks at one run, again and again."""

    def __init__(self, run: Run, config: RunConfig, slurm: Slurm | None = None) -> None:
        self.run, self.config = run, config
        self._slurm = slurm or Slurm()
        self._ledger = Ledger(run)
        self._answer = Answer()
        self._history_at = float("-inf")
        self._silent_since: float | None = None
        self._ask_again_at = float("-inf")
        self._stray_since: dict[str, float] = {}

    def look(self) -> RunStatus:
        """How the run stands now.

        Raises:
            DataError: the ledger, or a receipt, is damaged.
        """
        submissions = self._ledger.all()
        if not submissions:
            return run_status(self.run, self.config)
        slurm = self._ask(submissions)
        finished: set[str] = set()
        names = [stage.name for stage in stages_of(self.config)]

        def overlay(status: StageStatus) -> StageStatus:
            is_next = finished.issuperset(names[: names.index(status.name)])
            if status.state == "done":
                finished.add(status.name)
            return self._overlaid(status, finished, asked=slurm == "answers", is_next=is_next)

        status = run_status(self.run, self.config, overlay)
        since = self._silent_since if slurm == "silent" else None
        return replace(status, submitted=True, slurm=slurm, slurm_silent_since=since)

    def _ask(self, submissions: Sequence[Submission]) -> Literal["answers", "silent", "absent"]:
        """Bring the answer up to date, if Slurm gives one."""
        if not self._slurm.is_available():
            self._answer = Answer(tuple(submissions))
            return "absent"
        if time.monotonic() < self._ask_again_at:
            return "silent"
        try:
            self._answer = self._asked(submissions)
        except SlurmUnreachableError:
            self._silent_since = self._silent_since or time.time()
            self._ask_again_at = time.monotonic() + _SILENT_PAUSE_S
            self._answer = replace(self._answer, submissions=tuple(submissions))
            return "silent"
        self._silent_since = None
        return "answers"

    def _asked(self, submissions: Sequence[Submission]) -> Answer:
        unknown = [s for s in submissions if not s.job_ids and not self._ledger.was_noted(s)]
        if unknown:
            # Whoever submitted these died, or is about to write down their ids.
            tasks = self._slurm.queue_by_comment(COMMENT_PREFIX)
            submissions = [_adopted(s, tasks) if s in unknown else s for s in submissions]
        ids = {job_id for s in submissions for job_id in s.job_ids}
        if unknown:
            tasks = [task for task in tasks if task.job_id in ids]
        else:
            tasks = self._slurm.queue(ids)
        history = self._answer.history
        if time.monotonic() - self._history_at >= HISTORY_EVERY_S:
            asked = self._slurm.history(ids)
            history = tuple(asked) if asked is not None else None
            self._history_at = time.monotonic()
        return Answer(tuple(submissions), tuple(tasks), history)

    def _overlaid(
        self, status: StageStatus, finished: set[str], *, asked: bool, is_next: bool
    ) -> StageStatus:
        answer = self._answer
        jobs = StageJobs.of(status.name, answer.submissions, answer.tasks, answer.history, finished)
        status = self._with_gpu_time(status, jobs)
        if jobs is None:
            return status
        if status.state == "done":
            return replace(status, jobs=jobs.facts())
        status = replace(
            status,
            jobs=jobs.facts(),
            state=jobs.state(status.state, known=asked or bool(answer.tasks), is_next=is_next),
            shards=jobs.shards(status.shards, self.run),
            silent=jobs.silent(status.attempts, self.run),
        )
        return replace(status, strays=self._strays(status)) if asked else status

    def _with_gpu_time(self, status: StageStatus, jobs: StageJobs | None) -> StageStatus:
        answer = self._answer
        spent: GpuTime | None
        if answer.history is not None:
            spent = gpu_hours.from_history(
                status.name, answer.submissions, answer.history, self.run
            )
        elif status.gpu is None and jobs is not None:
            spent = gpu_hours.without_history(status, answer.submissions, answer.tasks)
        else:
            return status
        return replace(status, gpu=spent if spent is not None and spent.spent_s else None)

    def _strays(self, status: StageStatus) -> int:
        """Attempts that have gone on for a while after Slurm forgot or ended their jobs."""
        live = {task.raw_id for task in self._answer.tasks if not task.ended}
        now = time.monotonic()
        strays = {a.attempt for a in status.attempts if a.alive and a.job and a.job not in live}
        known = {attempt.attempt for attempt in status.attempts}
        for gone in (known & set(self._stray_since)) - strays:
            del self._stray_since[gone]
        return sum(now - self._stray_since.setdefault(s, now) > SILENT_AFTER_S for s in strays)


def _adopted(submission: Submission, tasks: Sequence[TaskState]) -> Submission:
    """A submission with the ids of the jobs that carry its comment."""
    ids = tuple(dict.fromkeys(t.job_id for t in tasks if t.comment == submission.comment))
    return replace(submission, job_ids=ids, starts=(0,) * len(ids)) if ids else submission


def look(run: Run, config: RunConfig) -> RunStatus:
    """How a run stands, by its files and by Slurm."""
    return Board(run, config).look()
