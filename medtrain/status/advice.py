"""What is going on in a run, in one sentence, and the exact command that a person may have to type.

Nothing is asked of a person while something runs or waits that will end by itself.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

from medtrain.status import words
from medtrain.status.facts import Jobs, StageStatus

if TYPE_CHECKING:
    from medtrain.status.look import RunStatus

_CONFIG_ERROR = 64


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that does not go as it should."""

    stage: str
    message: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Advice:
    """What a person should know and do."""

    happening: str
    problems: tuple[Problem, ...]
    needs_person: bool
    """Whether nothing more will happen by itself."""
    command: str


def advise(status: RunStatus) -> Advice:
    """What to say of a run."""
    command, needs_person = _command(status)
    return Advice(_happening(status), tuple(_problems(status)), needs_person, command)


def _command(status: RunStatus) -> tuple[str, bool]:
    run = status.run
    root = shlex.quote(str(run.root))
    if status.done:
        return f"open {shlex.quote(str(run.report / 'index.html'))}", False
    stuck = [stage.jobs for stage in status.stages if stage.jobs and stage.jobs.needs_person]
    moving = any(stage.state == "running" for stage in status.stages)
    if stuck and not moving:
        return _unstick(stuck[0], root), True
    if status.alive or status.slurm in ("silent", "absent"):
        return f"medtrain watch {root}", False
    if not status.submitted:
        return f"medtrain run {shlex.quote(str(run.config))}", True
    began = any(stage.state in ("failed", "stopped") for stage in status.stages)
    return f"medtrain {'resume' if began else 'submit'} {root}", True


def _unstick(jobs: Jobs, root: str) -> str:
    if "held" in jobs.reason.lower() and "admin" not in jobs.reason.lower():
        return f"scontrol release {' '.join(jobs.ids)}"
    return f"medtrain resume {root}"


def _happening(status: RunStatus) -> str:
    said = [_moving(stage) for stage in status.stages if stage.state == "running"]
    if not said:
        said = [_waiting(s) for s in status.stages if s.state == "queued"][:1]
    if status.done:
        said = ["Everything is done."]
    elif not said:
        said = [_standing_still(status)]
    if status.slurm == "silent" and not status.done:
        since = status.slurm_silent_since
        when = f" since {words.moment(since)}" if since else ""
        said.insert(0, f"Slurm has not answered{when}; what is said of jobs may be out of date.")
    elif status.slurm == "absent" and not status.done:
        said.insert(0, "There is no Slurm on this machine: what is queued is not known here.")
    return " ".join(said)


def _moving(stage: StageStatus) -> str:
    amount = stage.amount
    if amount is None:
        return f"{stage.name} runs."
    eta = f", about {words.duration(amount.eta_s)} left" if amount.eta_s is not None else ""
    failed = stage.shards.failed if stage.shards else 0
    some = f"; {failed:,} shard{'s have' if failed > 1 else ' has'} failed" if failed else ""
    return f"{stage.name} runs: {amount.done:,} of {amount.total:,} {amount.unit}{eta}{some}."


def _waiting(stage: StageStatus) -> str:
    jobs = stage.jobs
    if jobs is None or not jobs.reason:
        return f"{stage.name} is queued."
    start = f"; expected to begin at {words.moment(jobs.starts_at)}" if jobs.starts_at else ""
    return f"{stage.name} is queued: {jobs.sentence} ({jobs.reason}){start}."


def _standing_still(status: RunStatus) -> str:
    if status.holder:
        return f"{status.holder} works in it."
    where = status.next_stage
    if all(stage.state == "missing" for stage in status.stages):
        return "Nothing has begun yet."
    queued = " and nothing is queued" if status.submitted else ""
    state = next(stage.state for stage in status.stages if stage.name == where)
    ends = {"failed": f"{where} failed", "stopped": f"{where} stopped before its end"}
    return f"Nothing runs{queued}: {ends.get(state, f'the next stage is {where}')}."


def _problems(status: RunStatus) -> list[Problem]:
    found: list[Problem] = []
    for stage in status.stages:
        if stage.state == "done":
            continue
        if stage.state == "failed" and stage.failure is not None:
            found.append(Problem(stage.name, stage.failure.message, stage.failure.fix))
        elif stage.state == "failed" and stage.jobs and stage.jobs.ended:
            logs = f"Its logs: medtrain logs {shlex.quote(str(status.run.root))} {stage.name}"
            found.append(Problem(stage.name, stage.jobs.ended, logs))
        if stage.jobs and stage.jobs.needs_person and stage.jobs.waiting:
            found.append(Problem(stage.name, f"{stage.jobs.sentence} ({stage.jobs.reason})"))
        found += [Problem(stage.name, *said) for said in _lifeless(stage)]
    return found


def _lifeless(stage: StageStatus) -> list[tuple[str, str]]:
    found = []
    if stage.silent:
        some = "1 task runs" if stage.silent == 1 else f"{stage.silent} tasks run"
        found.append(
            (
                f"{some} by Slurm's word, but with no sign of life for 90 s or more",
                "Look at its log; what a dead task held is computed again after scancel.",
            )
        )
    if stage.strays:
        some = "1 process goes" if stage.strays == 1 else f"{stage.strays} processes go"
        found.append(
            (
                f"{some} on working though Slurm knows no such job any more",
                "It does no harm: of two results of a row one counts. Its node may be cut off.",
            )
        )
    return found
