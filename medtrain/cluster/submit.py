"""`medtrain submit`, `resume`, `cancel`: a run's chain of jobs, queued once.

stages that are not done → steps → less those that a queued or running job does already → jobs →
sbatch, each waiting for the one before it. Submitting again queues what is missing and nothing
else, whoever died in between: the ledger tells what was submitted, Slurm what became of it.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from medtrain.beforehand import check_key, check_packages, check_place
from medtrain.cluster.chain import ChainJob, plan_chain, steps_of
from medtrain.cluster.dispatch import DEFAULT_MAX_ARRAY_SIZE, Dispatcher, Script
from medtrain.cluster.intents import settle_all
from medtrain.cluster.ledger import Ledger, Step, Submission
from medtrain.cluster.repair import missing_tasks, move_dependents
from medtrain.cluster.slurm import Slurm, SlurmUnreachableError
from medtrain.cluster.standing import done_steps, doomed, forget_steps
from medtrain.config import RunConfig, dump_config, load_config
from medtrain.console import Console
from medtrain.endpoint import read_secrets
from medtrain.errors import ConfigError, DataError, TryAgainError
from medtrain.files import write_text
from medtrain.inputs import anchored
from medtrain.lineage import flatten
from medtrain.pipeline import Pipeline
from medtrain.run import Run
from medtrain.selection import Selection
from medtrain.stage import Stage
from medtrain.stages import STAGES, needed_before

_HOW = ("train", "cluster")
"""Sections that say how a run is computed, and not what."""


@dataclass(frozen=True)
class Queued:
    """What a submission came to."""

    submitted: tuple[Submission, ...]
    held: tuple[str, ...]
    """Keys of jobs that were queued or running already and do a part of what was asked."""


def submit_chain(run: Run, config: RunConfig, console: Console, selection: Selection) -> Queued:
    """Queue what is neither done nor queued.

    Raises:
        ConfigError: Slurm refuses a job, a key is missing, or Slurm is not here.
        DataError: a stage before the chosen ones is not done.
        TryAgainError: jobs of this run are queued with another configuration.
        SlurmUnreachableError: Slurm does not answer.
    """
    slurm = Slurm()
    if not slurm.can_submit():
        raise ConfigError(
            "This machine has no sbatch",
            fix="Submit on a login node, or run it here: medtrain run CONFIG [--executor local].",
        )
    run = Run(run.root.absolute())
    chosen = selection.stages()
    pipeline = Pipeline(run, config, console)
    check_place(run)
    undone = pipeline.undone(chosen, selection.force)
    check_key(
        config, {stage.name for stage in undone}, also=read_secrets(config.cluster.secrets_file)
    )
    cluster = config.cluster
    # Jobs may have packages that this machine has not.
    like_here = not (cluster.python or cluster.container or cluster.modules or cluster.setup)
    if like_here and not cluster.activate and any(stage.trains for stage in undone):
        check_packages(config)
    run.create()
    _check_names(run)
    with run.submitting():
        numbers = Ledger(run).next_numbers()
        alive = _without_doomed(pipeline, slurm, living(run, slurm))
        if not alive:
            with run.lock():
                pass  # whoever computes here would hold up the jobs
        _check_before(pipeline, chosen[0], alive)
        _check_configuration(run, config, alive)
        write_text(run.config, dump_config(anchored(config)))
        _forget_forced(run, pipeline, chosen, selection, alive)
        return _queue(run, config, slurm, pipeline, chosen, alive, numbers)


def resume_chain(run: Run, config: RunConfig, console: Console) -> Queued:
    """Queue what is missing of a run, as far as it was submitted before."""
    ever = {stage for submission in Ledger(run).all() for stage in submission.stages}
    last = next((stage.name for stage in reversed(STAGES) if stage.name in ever), None)
    return submit_chain(run, config, console, Selection(until=last))


def cancel_chain(run: Run, slurm: Slurm | None = None) -> list[Submission]:
    """Cancel whatever of a run is queued or runs; what is finished is kept.

    Raises:
        ConfigError: Slurm is not here.
        SlurmUnreachableError: Slurm does not answer.
    """
    slurm = slurm or Slurm()
    if not slurm.is_available():
        raise ConfigError("This machine has no Slurm", fix="Cancel on a login node of the cluster.")
    with run.submitting():
        alive = living(run, slurm)
        slurm.cancel(job_id for s in alive for job_id in s.job_ids)
    return alive


def refuse_while_queued(run: Run) -> None:
    """Keep a process of this machine off a run that jobs work on.

    Raises:
        TryAgainError: jobs of the run are queued or run.
        SlurmUnreachableError: Slurm does not answer.
    """
    slurm = Slurm()
    if not run.submissions.is_dir() or not slurm.is_available():
        return
    states = slurm.queue(job_id for s in Ledger(run).all() for job_id in s.job_ids)
    if any(not state.ended for state in states):
        raise TryAgainError(
            f"Jobs of {run.root} are queued or run",
            fix=f"See them: medtrain watch {run.root}. Or cancel them first: "
            f"medtrain cancel {run.root}",
        )


def dry_run(
    run: Run, config: RunConfig, console: Console, selection: Selection
) -> list[tuple[ChainJob, list[Script]]]:
    """Every job that would be submitted, with its scripts; nothing is touched."""
    chosen = selection.stages()
    pipeline = Pipeline(run, config, console)
    steps = steps_of(_unfinished(pipeline, chosen), config)
    dispatcher = Dispatcher(run, config, max_array_size=_max_array_size())
    return [(job, dispatcher.scripts(job)) for job in plan_chain(steps, config)]


def living(run: Run, slurm: Slurm) -> list[Submission]:
    """The submissions that Slurm has yet to finish; intents of dead submitters are cleared up."""
    settle_all(run, slurm)
    everything = Ledger(run).all()
    states = slurm.queue(job_id for s in everything for job_id in s.job_ids)
    going_on = {state.job_id for state in states if not state.ended}
    return [s for s in everything if going_on.intersection(s.job_ids)]


def _without_doomed(
    pipeline: Pipeline, slurm: Slurm, alive: Sequence[Submission]
) -> list[Submission]:
    """The jobs to count on; those that wait for something that will not come are cancelled."""
    lost = doomed(pipeline, alive)
    slurm.cancel(job_id for s in lost for job_id in s.job_ids)
    return [submission for submission in alive if submission not in lost]


def _check_names(run: Run) -> None:
    """Slurm fills in patterns in the names of logs."""
    if any(character in str(run.root) for character in "%\\\n"):
        raise ConfigError(
            f"Slurm cannot write logs into {run.root}: it takes % and \\ for its own",
            fix="Choose another output_dir or name.",
        )


def _check_before(pipeline: Pipeline, first: Stage, alive: Sequence[Submission]) -> None:
    queued = {stage for s in alive for stage in s.stages}
    needed = needed_before(first, pipeline.run, pipeline.config)
    if not queued.intersection(stage.name for stage in needed):
        pipeline.check_before(first)


def _check_configuration(run: Run, config: RunConfig, alive: Sequence[Submission]) -> None:
    if not alive or not run.config.exists():
        return
    before, now = (_what(c) for c in (load_config(run.config), anchored(config)))
    if before != now:
        keys = [
            key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)
        ]
        shown = ", ".join(f"{k} {before.get(k)} → {now.get(k)}" for k in keys[:3])
        raise TryAgainError(
            f"Jobs of {run.root} are queued with another configuration: {shown}"
            f"{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}",
            fix=f"Cancel them first: medtrain cancel {run.root}. What does not depend on the "
            "change is kept.",
        )


def _what(config: RunConfig) -> dict[str, Any]:
    tree = config.model_dump(mode="json")
    return flatten({section: value for section, value in tree.items() if section not in _HOW})


def _forget_forced(
    run: Run,
    pipeline: Pipeline,
    chosen: Sequence[Stage],
    selection: Selection,
    alive: Sequence[Submission],
) -> None:
    forced = [stage for stage in chosen if stage.name in selection.force]
    busy = {stage for s in alive for stage in s.stages}.intersection(s.name for s in forced)
    if busy:
        raise TryAgainError(
            f"{', '.join(sorted(busy))} is queued or runs, so it cannot be begun anew",
            fix=f"Cancel it first: medtrain cancel {run.root}",
        )
    if forced:
        with run.lock():
            for stage in forced:
                pipeline.forget(stage)
                forget_steps(run, stage.name)


def _unfinished(pipeline: Pipeline, chosen: Sequence[Stage]) -> list[Stage]:
    """From the first stage that is not done: those after it may have to be made anew, and the jobs
    find out."""
    for place, stage in enumerate(chosen):
        if pipeline.standing(stage).state != "done":
            return list(chosen[place:])
    return []


def _queue(
    run: Run,
    config: RunConfig,
    slurm: Slurm,
    pipeline: Pipeline,
    chosen: Sequence[Stage],
    alive: Sequence[Submission],
    numbers: Counter[str],
) -> Queued:
    # What is queued while a part of a chain lives belongs to it.
    chain = alive[-1].chain if alive else uuid.uuid4().hex[:16]
    steps = steps_of(_unfinished(pipeline, chosen), config)
    done = done_steps(run, chain)
    steps = [step for step in steps if step not in done]
    holders = _holders(alive)
    jobs = plan_chain(steps, config, {s: k for s, k in holders.items() if s in steps})
    ids: dict[str, Sequence[str]] = {s.key: s.job_ids for s in alive}
    size = slurm.max_array_size()
    dispatcher = Dispatcher(run, config, max_array_size=size, chain=chain, numbers=numbers)
    submitted: list[Submission] = []
    for job in jobs:
        queued = dispatcher.submit(_only_missing(run, config, pipeline, job), ids)
        submitted.append(queued)
        ids[queued.key] = queued.job_ids
        if any(queued.key in dict(s.after) for s in alive):
            move_dependents(dispatcher.ledger, slurm, queued.key)
    return Queued(tuple(submitted), tuple(dict.fromkeys(holders[s] for s in steps if s in holders)))


def _holders(alive: Sequence[Submission]) -> dict[Step, str]:
    """Which job does a step. Shards whose collect job is queued are its business."""
    holders = {step: s.key for s in alive for step in s.steps}
    closed = [step for step in holders if step[0] == "close"]
    for _, stage, phase in closed:
        holders.setdefault(("shards", stage, phase), f"{stage}.{phase}")
    return holders


def _only_missing(run: Run, config: RunConfig, pipeline: Pipeline, job: ChainJob) -> ChainJob:
    """Of an array whose stage was begun under this very configuration, the tasks that are left."""
    if not job.tasks:
        return job
    from dataclasses import replace

    from medtrain.stages import by_name

    stage = by_name(job.steps[0][1])
    try:
        begun = pipeline.lineage.started(stage.name) == pipeline.fingerprint(stage).digest
        if not begun:
            return job
        left = missing_tasks(run, config, job.steps[0])
    except DataError:
        return job
    return replace(job, tasks=left or job.tasks[:1])


def _max_array_size() -> int:
    slurm = Slurm()
    try:
        return slurm.max_array_size() if slurm.is_available() else DEFAULT_MAX_ARRAY_SIZE
    except SlurmUnreachableError:
        return DEFAULT_MAX_ARRAY_SIZE
