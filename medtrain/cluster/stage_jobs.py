"""What Slurm's answer means for one stage.

submissions that work on the stage + tasks in the queue + incarnations in the accounts → which of
its tasks run, wait, or have ended badly; the stage's state; its shards; tasks that are silent
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from medtrain.cluster.ledger import Submission
from medtrain.cluster.queue_state import Incarnation, TaskState, explain
from medtrain.run import Run
from medtrain.shards import Unit
from medtrain.shards.progress import OpenAttempt
from medtrain.shards.shard_files import ShardFiles
from medtrain.status import Jobs, Shards
from medtrain.status.facts import State
from medtrain.status.sharded import shard_directory

SILENT_AFTER_S = 90.0
"""A running task whose attempt has not shown itself for longer is in trouble."""
_STARTS_WITHIN_S = 600.0
"""A running task has begun its first shard by then: libraries and rows have been loaded."""


@dataclass(frozen=True, slots=True)
class _Ending:
    """How a task's last incarnation ended."""

    submission: Submission
    index: int | None
    state: str
    exit_code: int
    job_id: str


@dataclass(frozen=True)
class StageJobs:
    """The tasks of one stage."""

    stage: str
    submissions: tuple[Submission, ...]
    running: tuple[tuple[Submission, TaskState], ...]
    waiting: tuple[tuple[Submission, TaskState], ...]
    failed: tuple[_Ending, ...]
    """Tasks that ended otherwise than well and that nobody repeats, as far as the queue tells."""
    requeues: int

    @classmethod
    def of(
        cls,
        stage: str,
        submissions: Iterable[Submission],
        tasks: Iterable[TaskState],
        history: Iterable[Incarnation] | None,
        finished: Collection[str],
    ) -> StageJobs | None:
        """The tasks of a stage; None if it was never submitted.

        Args:
            stage: its name.
            submissions: of the run.
            tasks: the queue.
            history: the accounts, where there are any.
            finished: stages that are done, by their files: a job of several stages is at the first
                that is not.
        """
        own = tuple(s for s in submissions if stage in s.stages)
        if not own:
            return None
        owners = {job_id: s for s in own for job_id in s.job_ids}
        mine = [(owners[task.job_id], task) for task in tasks if task.job_id in owners]
        live = [(s, task) for s, task in mine if not task.ended]
        here = {s.nonce for s in own if _at_stage(s, finished) == stage}
        past = [one for one in history or () if one.job_id in owners]
        return cls(
            stage=stage,
            submissions=own,
            running=tuple((s, t) for s, t in live if t.runs and s.nonce in here),
            waiting=tuple((s, t) for s, t in live if t.waits or s.nonce not in here),
            failed=tuple(e for e in _failed(owners, mine, past) if e.submission.nonce in here),
            requeues=_requeues([task for _, task in mine], past),
        )

    def facts(self) -> Jobs:
        """As the status shows them."""
        ids = tuple(dict.fromkeys(job_id for s in self.submissions for job_id in s.job_ids))
        waiting = sorted((task for _, task in self.waiting if task.waits), key=_first_to_start)
        first = waiting[0] if waiting else None
        stuck = next((task for task in waiting if explain(task.reason).needs_person), None)
        shown = stuck or first
        explained = explain(shown.reason) if shown else None
        return Jobs(
            ids=ids,
            running=sum(task.count for _, task in self.running),
            waiting=sum(task.count for _, task in self.waiting),
            failed=len(self.failed),
            reason=shown.reason if shown else "",
            sentence=explained.sentence if explained else "",
            needs_person=stuck is not None,
            starts_at=first.starts_at if first else None,
            elapsed_s=max((task.elapsed_s for _, task in self.running), default=0),
            requeues=self.requeues,
            repair_round=max(s.repair.round for s in self.submissions),
            ended=_said_of(self.failed),
        )

    def state(self, by_files: State, *, known: bool, is_next: bool) -> State:
        """The state of an unfinished stage.

        Args:
            by_files: what its files say.
            known: whether Slurm has said anything of its jobs, now or earlier.
            is_next: whether everything before it is done; if not, it could but fail.
        """
        if self.running or by_files == "running":
            return "running"
        if self.waiting:
            return "queued"
        if not known:
            # No news of Slurm: nobody can say that a stage that has begun does not go on.
            return "begun" if by_files == "stopped" else by_files
        # What was cancelled was stopped by a person, or because an earlier job had failed.
        failed = is_next and any(ending.state != "CANCELLED" for ending in self.failed)
        return "failed" if failed and by_files in ("stopped", "missing") else by_files

    def shards(self, planned: Shards | None, run: Run) -> Shards | None:
        """The shards by files, with those that are in the queue, and those that were given up."""
        arrays = [s for s in self.submissions if s.is_array]
        if planned is None or not arrays:
            return planned
        waiting = _units(task for task in self.waiting if task[0].is_array)
        running = _units(self.running)
        failed = (
            {
                unit
                for ending in self.failed
                for unit in _units_of(ending.submission, ending.job_id, ending.index)
            }
            - set(waiting)
            - set(running)
        )
        return replace(
            planned,
            running=max(planned.running, sum(t.count for s, t in self.running if s.is_array)),
            waiting=len(_undone(run, self.stage, waiting)),
            failed=len(_undone(run, self.stage, failed)),
        )

    def silent(self, attempts: Sequence[OpenAttempt], run: Run) -> int:
        """Running array tasks that have not shown a sign of life for too long."""
        beats: dict[str, float] = {}
        for attempt in attempts:
            age_s = min(beats.get(attempt.job, attempt.beat_age_s), attempt.beat_age_s)
            beats[attempt.job] = age_s
        return sum(
            self._is_silent(submission, task, beats.get(task.raw_id), run)
            for submission, task in self.running
            if submission.is_array and task.state == "RUNNING"
        )

    def _is_silent(
        self, submission: Submission, task: TaskState, age_s: float | None, run: Run
    ) -> bool:
        if age_s is not None:
            return min(age_s, task.elapsed_s) > SILENT_AFTER_S
        # It has not begun a shard yet, or is between two.
        late = task.elapsed_s > _STARTS_WITHIN_S
        return late and bool(_undone(run, self.stage, _units([(submission, task)])))


def _at_stage(submission: Submission, finished: Collection[str]) -> str | None:
    """The stage that a job of several stages is at."""
    return next((stage for stage in submission.stages if stage not in finished), None)


def _first_to_start(task: TaskState) -> tuple[bool, float, bool]:
    """Those that wait for another job come last: they say less."""
    unknown = task.starts_at is None
    return task.reason == "Dependency", task.starts_at or 0.0, unknown


def _failed(
    owners: dict[str, Submission],
    mine: Iterable[tuple[Submission, TaskState]],
    past: Iterable[Incarnation],
) -> list[_Ending]:
    """The tasks whose last word is a bad end: the queue's word, or else that of the accounts."""
    last: dict[tuple[str, int | None], _Ending] = {}
    live: set[tuple[str, int | None]] = set()
    for one in past:
        ending = _Ending(owners[one.job_id], one.index, one.state, one.exit_code, one.job_id)
        last[one.job_id, one.index] = ending
        (live.discard if one.ended else live.add)((one.job_id, one.index))
    for submission, task in mine:
        for index in task.indices or (None,):
            last[task.job_id, index] = _Ending(
                submission, index, task.state, task.exit_code, task.job_id
            )
            (live.discard if task.ended else live.add)((task.job_id, index))
    return [e for key, e in last.items() if key not in live and e.state != "COMPLETED"]


def _requeues(tasks: Iterable[TaskState], past: Iterable[Incarnation]) -> int:
    """How often tasks began again: by the accounts, or as far as the queue remembers."""
    begun: dict[tuple[str, int | None], int] = {}
    for one in past:
        begun[one.job_id, one.index] = begun.get((one.job_id, one.index), 0) + 1
    counted = {key: times - 1 for key, times in begun.items()}
    for task in tasks:
        for index in task.indices or (None,):
            key = (task.job_id, index)
            counted[key] = max(counted.get(key, 0), task.restarts)
    return sum(counted.values())


def _said_of(failed: Sequence[_Ending]) -> str:
    if not failed:
        return ""
    one = next((ending for ending in failed if ending.state != "CANCELLED"), failed[0])
    task = one.job_id if one.index is None else f"{one.job_id}_{one.index}"
    code = f" with exit code {one.exit_code}" if one.exit_code and one.state == "FAILED" else ""
    more = f", and {len(failed) - 1} more" if len(failed) > 1 else ""
    return f"job {task} ended: {one.state}{code}{more}"


def _units_of(submission: Submission, job_id: str, index: int | None) -> tuple[Unit, ...]:
    # An array of one task is a plain job to Slurm.
    task = submission.task_of(job_id, index or 0)
    return submission.tasks[task] if task is not None else ()


def _units(of: Iterable[tuple[Submission, TaskState]]) -> set[Unit]:
    return {
        unit
        for submission, task in of
        for index in task.indices or (0,)
        for unit in _units_of(submission, task.job_id, index)
    }


def _undone(run: Run, stage: str, units: Iterable[Unit]) -> list[Unit]:
    """Those whose shard has no receipt."""
    return [
        (key, shard)
        for key, shard in units
        if not ShardFiles(shard_directory(run, stage, key), shard).done.exists()
    ]
