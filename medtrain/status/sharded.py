"""How far a sharded stage is: the sum over the sets of its phases.

Progress of every shard set → rows, shards, GPU time, who works → if nobody does, the errors of the
shards that are not done.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from medtrain.config import RunConfig
from medtrain.run import Run
from medtrain.shards.failures import shard_failures
from medtrain.shards.progress import Progress, shard_progress
from medtrain.stage import Stage
from medtrain.status.facts import Amount, Failure, GpuTime, Shards, StageStatus


def sharded_progress(run: Run, config: RunConfig, stage: Stage, status: StageStatus) -> StageStatus:
    """The status of a stage with how far its rows and shards are.

    Of a finished stage it is the GPU time that is wanted; an unfinished one runs where the files
    show a sign of life, and has failed where they show nothing but errors.
    """
    phases = {
        phase.name: _planned(run, stage, (key for units in phase.tasks(config) for key, _ in units))
        for phase in stage.active_phases(config)
    }
    sets = [found for planned in phases.values() for found in planned.values()]
    if not sets:
        return status
    status = replace(status, gpu=_gpu(sets))
    if status.state == "done":
        return status
    amounts = [(name, _amount(list(found.values()))) for name, found in phases.items() if found]
    status = replace(
        status,
        amount=_amount(sets),
        parts=tuple(amounts) if len(amounts) > 1 else (),
        shards=_shards(sets),
        errors=sum(found.errors for found in sets),
        quarantined=sum(found.quarantined for found in sets),
        attempts=tuple(attempt for found in sets for attempt in found.open_attempts),
    )
    if any(attempt.alive for attempt in status.attempts):
        return replace(status, state="running")
    directories = [directory for found in phases.values() for directory in found]
    failure = _failure(directories) or status.failure
    return replace(status, failure=failure, state="failed" if failure else status.state)


def shard_directory(run: Run, stage: str, key: str) -> Path:
    """Where the shard set of that key keeps its files."""
    if stage != "evaluate":
        of_stage = {"generate": run.generate, "judge": run.judge, "reference": run.reference_shards}
        return of_stage[stage]
    kind, _, variant = key.partition(".")
    if kind == "answers":
        return run.answers_shards(variant)
    return run.loss_shards(variant) if kind == "loss" else run.evaluate_judge(key)


def _planned(run: Run, stage: Stage, keys: Iterable[str]) -> dict[Path, Progress]:
    """The sets that have a plan."""
    directories = dict.fromkeys(shard_directory(run, stage.name, key) for key in keys)
    found = {directory: shard_progress(directory) for directory in directories}
    return {directory: progress for directory, progress in found.items() if progress.total}


def _amount(sets: Sequence[Progress]) -> Amount:
    moving = [s for s in sets if any(attempt.alive for attempt in s.open_attempts)]
    return Amount(
        done=sum(s.done for s in sets),
        total=sum(s.total for s in sets),
        per_s=sum(s.rows_per_s for s in moving) or None,
    )


def _shards(sets: Sequence[Progress]) -> Shards:
    return Shards(
        total=sum(s.shards_total for s in sets),
        done=sum(s.shards_done for s in sets),
        running=sum(len({a.shard for a in s.open_attempts if a.alive}) for s in sets),
    )


def _gpu(sets: Sequence[Progress]) -> GpuTime | None:
    spent = sum(s.gpu_seconds for s in sets)
    return GpuTime(spent, sum(s.gpu_seconds_wasted for s in sets)) if spent else None


def _failure(directories: Sequence[Path]) -> Failure | None:
    """The newest error of a shard that is not done, and how many more have one."""
    failures = [failure for directory in directories for failure in shard_failures(directory)]
    if not failures:
        return None
    newest = max(failures, key=lambda failure: failure.at)
    others = len({failure.shard for failure in failures}) - 1
    more = f" (and {others} more shards)" if others else ""
    message = f"shard {newest.shard} on {newest.host}: {newest.message}{more}"
    return Failure(message, newest.fix, newest.exit_code)
