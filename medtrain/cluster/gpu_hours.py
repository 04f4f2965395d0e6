"""GPU time that a stage has spent, and how much of it left nothing behind.

Where Slurm keeps accounts: every incarnation of its jobs times the GPUs that the ledger gives it;
wasted is what one that did not end well did after its last finished row, or checkpoint.
Where it does not: shards tell it themselves (see medtrain.shards.progress); of other stages what is
known is how long the finished one took, or how long its job has been running.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from medtrain.cluster.ledger import Submission
from medtrain.cluster.queue_state import Incarnation, TaskState
from medtrain.run import Run
from medtrain.shards.liveness import Beat
from medtrain.shards.shard_files import AttemptFiles, ShardFiles
from medtrain.status import GpuTime, StageStatus
from medtrain.status.sharded import shard_directory
from medtrain.status.training import last_checkpoint_at


def from_history(
    stage: str, submissions: Iterable[Submission], history: Sequence[Incarnation], run: Run
) -> GpuTime:
    """GPU time of a stage by the accounts."""
    owners = _owners(stage, submissions)
    total, begun = GpuTime(), Counter[tuple[str, int | None]]()
    for one in history:
        if (owner := owners.get(one.job_id)) is None:
            continue
        restart = begun[one.job_id, one.index]
        begun[one.job_id, one.index] += 1
        wasted_s = _wasted_s(one, restart, owner, run) if _ended_badly(one) else 0.0
        total += GpuTime(one.elapsed_s * owner.gpus, wasted_s * owner.gpus)
    return total


def without_history(
    status: StageStatus, submissions: Iterable[Submission], tasks: Iterable[TaskState]
) -> GpuTime | None:
    """GPU time of a stage without shards, where there are no accounts."""
    owners = _owners(status.name, submissions)
    if not owners:
        return None
    if status.seconds is not None:
        return GpuTime(status.seconds * max(owner.gpus for owner in owners.values()))
    return GpuTime(
        float(sum(t.elapsed_s * owners[t.job_id].gpus for t in tasks if t.job_id in owners))
    )


def _owners(stage: str, submissions: Iterable[Submission]) -> dict[str, Submission]:
    """The stage's jobs with GPUs; a job of several stages is its first one's."""
    mine = (s for s in submissions if s.gpus and s.stages[0] == stage)
    return {job_id: s for s in mine for job_id in s.job_ids}


def _ended_badly(one: Incarnation) -> bool:
    return one.ended_at is not None and one.state != "COMPLETED"


def _wasted_s(one: Incarnation, restart: int, owner: Submission, run: Run) -> float:
    kept = _last_kept(one, restart, owner, run)
    ended = one.ended_at or one.started_at
    wasted = ended - max(kept or one.started_at, one.started_at)
    return min(max(0.0, wasted), float(one.elapsed_s))


def _last_kept(one: Incarnation, restart: int, owner: Submission, run: Run) -> float | None:
    """When an incarnation last finished something that was kept; None if it never did.

    Of the checkpoints of a training only the newest are left: where there is one from after its
    end, it is taken for granted that this incarnation has handed on what it did.
    """
    stage = owner.stages[0]
    if not owner.is_array:
        return last_checkpoint_at(run, stage) if stage in ("sft", "dpo") else None
    task = owner.task_of(one.job_id, one.index or 0)
    last_rows = [
        beat.last_row_at
        for key, shard in (owner.tasks[task] if task is not None else ())
        for attempt in ShardFiles(shard_directory(run, stage, key), shard).attempts()
        if attempt.name.startswith(f"{one.raw_id}.{restart}.")
        and (beat := _last_beat(attempt)) is not None
        and beat.last_row_at is not None
    ]
    return max(last_rows, default=None)


def _last_beat(attempt: AttemptFiles) -> Beat | None:
    return Beat.read(attempt.end_mark() or attempt.heartbeat)
