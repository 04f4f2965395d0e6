"""What of a plan is out of proportion, with its remedy.

planned jobs → time limits that are shorter than a task, arrays of so many shards that they do
little but load, of so few that one takes days → a sentence each, with the setting to change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil
from typing import TYPE_CHECKING

from medtrain.cluster.workload import duration
from medtrain.config import RunConfig

if TYPE_CHECKING:
    from medtrain.cluster.plan import PlannedJob

_LONG_S, _GOOD_S = 24 * 3600.0, 4 * 3600.0
"""A task should not take longer than the first; the second is what is proposed instead."""


def out_of_proportion(jobs: Sequence[PlannedJob], config: RunConfig) -> Iterator[str]:
    """What is out of proportion, with its remedy."""
    for job in jobs:
        if job.state == "to do" and job.task_s is not None:
            yield from _against_its_limit(job, job.task_s, config)
            if job.steps[0][0] == "shards":
                yield from _against_its_shards(job, job.task_s, config)


def _against_its_limit(job: PlannedJob, task_s: float, config: RunConfig) -> Iterator[str]:
    if job.time_limit_s is None or task_s <= job.time_limit_s:
        return
    useful_s = max(60.0, job.time_limit_s - config.cluster.signal_delay_s - job.load_s)
    times, limit = ceil((task_s - job.load_s) / useful_s) - 1, config.cluster.max_requeues
    beyond = f", more than cluster.max_requeues={limit} allows" if times > limit else ""
    often = f"{times} times" if times > 1 else "once"
    yield (
        f"{job.key}: a task takes about {duration(task_s)} and its time limit is "
        f"{duration(job.time_limit_s)}, so it will be requeued {often}{beyond}; "
        f"cluster.stages.{job.kind}.time_min sets it"
    )


def _against_its_shards(job: PlannedJob, task_s: float, config: RunConfig) -> Iterator[str]:
    setting, shards = _shards_of(job, config)
    compute_s = task_s - job.load_s
    if shards > 1 and compute_s < job.load_s:
        fitting = max(1, int(shards * compute_s / (4 * job.load_s)))
        yield (
            f"{job.key}: loading the model ({duration(job.load_s)}) takes longer than the work of "
            f"a task ({duration(compute_s)}): {setting}={fitting} wastes less"
        )
    if task_s > _LONG_S:
        fitting = ceil(shards * compute_s / _GOOD_S)
        yield (
            f"{job.key}: a task takes about {duration(task_s)}: {setting}={fitting} "
            f"makes that {duration(_GOOD_S)}"
        )


def _shards_of(job: PlannedJob, config: RunConfig) -> tuple[str, int]:
    """The setting that says how many shards an array has, and its value."""
    stage = job.steps[0][1]
    if stage == "reference":
        return "dpo.reference_shards", config.dpo.reference_shards
    section = "judge" if job.kind == "judge" else stage
    shards: int = getattr(config, section).num_shards
    return f"{section}.num_shards", shards
