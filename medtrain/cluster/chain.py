"""From the stages of a run to the jobs of a chain.

stages to do → steps in order → jobs: a training stage is a job of its own, the shards of a phase
are an array, and what lies between two of those is one short job, which collects the array before
it, runs the stages between, and opens the array after it. A job waits for the one before it: for
its success, or, where that is an array, for its end, because missing shards are repaired.

    prepare → sft → merge-sft + open → [candidates] → collect + open → [verdicts] → collect, pairs,
    open → [sums] → collect → dpo → merge-dpo + open → [answers] → collect + open → [verdicts]
    → collect, evaluate, report
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from medtrain.cluster.ledger import Condition, Step
from medtrain.config import JobKind, RunConfig
from medtrain.shards import Unit
from medtrain.stage import PhaseRow, Stage
from medtrain.stages import by_name

_KIND_OF_STAGE: dict[str, JobKind] = {
    "sft": "sft", "dpo": "dpo", "merge-sft": "merge", "merge-dpo": "merge",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ChainJob:
    """One job or array of a chain."""

    key: str
    kind: JobKind
    steps: tuple[Step, ...]
    after: tuple[tuple[str, Condition], ...]
    """Keys of the jobs it waits for."""
    tasks: tuple[tuple[Unit, ...], ...] = ()
    """Of an array: what each task computes."""

    @property
    def trains(self) -> bool:
        """Whether it is a training stage, which starts a process for every GPU."""
        return self.steps[0][0] == "train"


def steps_of(stages: Sequence[Stage], config: RunConfig) -> list[Step]:
    """Everything a chain does for some stages, in order; nothing for those a run does not have."""
    steps: list[Step] = []
    for stage in stages:
        if not stage.wanted(config):
            continue
        phases = stage.active_phases(config)
        for phase in phases:
            steps += [(verb, stage.name, phase.name) for verb in ("open", "shards", "close")]
        if not phases:
            steps.append(("train" if stage.trains else "run", stage.name, ""))
    return steps


def phase_of(step: Step) -> PhaseRow:
    """The phase a step is about."""
    return next(p for p in by_name(step[1]).phases if p.name == step[2])


def is_last_phase(step: Step, config: RunConfig) -> bool:
    """Whether closing this phase finishes its stage."""
    return by_name(step[1]).active_phases(config)[-1].name == step[2]


def plan_chain(
    steps: Sequence[Step], config: RunConfig, holders: dict[Step, str] | None = None
) -> list[ChainJob]:
    """The jobs for some steps.

    Args:
        steps: in order.
        config: numbers of shards.
        holders: steps that a queued or running job does already, with its key; no job is made for
            them, but what follows waits for it.
    """
    holders = dict(holders or {})
    jobs: list[ChainJob] = []
    before: Step | None = None
    for group in _groups(steps, holders):
        if group[0] not in holders:
            after = _waits_for(before, holders)
            jobs.append(_job(group, after, config, taken=set(holders.values())))
            holders.update(dict.fromkeys(group, jobs[-1].key))
        before = group[-1]
    return jobs


def _groups(steps: Sequence[Step], held: Collection[Step]) -> list[list[Step]]:
    """Steps that make up a job: training and shards alone, what lies between them together."""
    groups: list[list[Step]] = []
    for step in steps:
        if groups and _goes_with(groups[-1], step, held):
            groups[-1].append(step)
        else:
            groups.append([step])
    return groups


def _goes_with(group: Sequence[Step], step: Step, held: Collection[Step]) -> bool:
    if any(verb in ("train", "shards") for verb, _, _ in (*group, step)):
        return False
    if (group[-1] in held) != (step in held):
        return False
    # A merge needs more memory than its neighbours; opening an array after it does not.
    return step[0] != "run" or _serial_kind([*group, step]) == _serial_kind(group)


def _serial_kind(steps: Sequence[Step]) -> JobKind:
    kinds = [_KIND_OF_STAGE.get(stage, "cpu") for verb, stage, _ in steps if verb == "run"]
    return next((kind for kind in kinds if kind != "cpu"), "cpu")


def _waits_for(before: Step | None, holders: dict[Step, str]) -> tuple[tuple[str, Condition], ...]:
    if before is None:
        return ()
    return ((holders[before], "afterany" if before[0] == "shards" else "afterok"),)


def _job(
    steps: Sequence[Step],
    after: tuple[tuple[str, Condition], ...],
    config: RunConfig,
    taken: Collection[str],
) -> ChainJob:
    verb, stage, phase = steps[0]
    if verb == "shards":
        row = phase_of(steps[0])
        tasks = tuple(row.tasks(config))
        return ChainJob(f"{stage}.{phase}", row.kind, tuple(steps), after, tasks)
    kind = _KIND_OF_STAGE[stage] if verb == "train" else _serial_kind(steps)
    key = stage if verb in ("train", "run") else f"{stage}.{phase}.{verb}"
    assert key not in taken, f"{key} is queued already"
    return ChainJob(key, kind, tuple(steps), after)
