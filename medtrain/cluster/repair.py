"""What a collect job does about shards that are missing.

missing shards, and why they failed → an error that a new try would only repeat ends the chain with
it; otherwise one more array of the missing shards, a new collect job behind it, and the jobs that
waited for this one wait for that. Rounds are bounded; where compute nodes may not submit jobs, the
command that does it is said.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medtrain.cluster.chain import ChainJob, phase_of
from medtrain.cluster.dispatch import Dispatcher, dependency_of
from medtrain.cluster.intents import settle_all
from medtrain.cluster.ledger import Ledger, Repair, Step, Submission
from medtrain.cluster.requeue import is_being_ended
from medtrain.cluster.site import Options
from medtrain.cluster.slurm import Slurm, SlurmUnreachableError
from medtrain.config import RunConfig
from medtrain.console import Console
from medtrain.errors import (
    BadNodeError,
    ConfigError,
    DataError,
    EndpointError,
    MedtrainError,
    TryAgainError,
    from_exit_code,
)
from medtrain.files import read_json
from medtrain.run import Run
from medtrain.shards import Unit, missing_units, rows_finished, take_for_dead

Tasks = tuple[tuple[Unit, ...], ...]
_NOT_WORTH_REPEATING = (ConfigError.exit_code, DataError.exit_code)
_MENDED_BY_TIME = (EndpointError.exit_code, TryAgainError.exit_code)


_OUTAGE_S, _OUTAGE_PAUSE_S = 900.0, 10.0
_MOST_ROUNDS = 20
"""However much each of them finishes: a cluster's time is not ours to burn."""


def repair(run: Run, config: RunConfig, console: Console, closing: Submission, step: Step) -> None:
    """Submit the missing shards of a phase and a job like this one behind them.

    Args:
        run: the run.
        config: its configuration.
        console: gets what is done.
        closing: the submission of the job that found shards missing.
        step: the step of it that closes the phase.

    Raises:
        MedtrainError: a shard failed for a reason that stays; with its exit code.
        TryAgainError: there were rounds enough, or this node may not submit jobs.
    """
    tasks = missing_tasks(run, config, step, jobs_are_over=True)
    failures = failures_of(run, f"{step[1]}.{step[2]}")
    _check_failures(run, failures)
    rows = _finished_rows(run, config, step)
    # A round that finished rows, or gave up on one that kills its process, was not in vain.
    before = closing.repair
    now = Repair(before.round + 1, before.in_vain + (rows <= before.rows), rows)
    if now.in_vain > config.cluster.repair_rounds or now.round > _MOST_ROUNDS:
        raise _given_up(run, step, tasks, before.round, failures)
    _check_may_submit(run, tasks, step)
    try:
        with run.submitting():
            if is_being_ended():
                raise TryAgainError("This job is being cancelled, so nothing is repaired")
            extra = _extra_options(config, failures, now)
            _Resubmission(run, config, closing, step, tasks, now, extra).patiently()
    except ConfigError as error:
        raise _cannot_submit(run, tasks, step, error.message) from error
    console.event(
        "repair",
        f"{len(tasks)} tasks of {step[1]} are submitted again",
        stage=step[1],
        phase=step[2],
        tasks=len(tasks),
        round=now.round,
    )


def missing_tasks(
    run: Run,
    config: RunConfig,
    step: Step,
    *,
    jobs_are_over: bool = False,
) -> Tasks:
    """The tasks of a phase that have a shard without a sound receipt.

    Args:
        run: the run.
        config: its configuration.
        step: of the phase.
        jobs_are_over: Slurm says that no job computes the phase any more, so that attempts without
            an end have died.
    """
    row = phase_of(step)
    with row.open(run, config) as phase:
        missing = set(missing_units(phase))
        if jobs_are_over:
            take_for_dead(phase, missing)
    grouped = {unit for task in row.tasks(config) for unit in task}
    tasks = [tuple(u for u in task if u in missing) for task in row.tasks(config)]
    # A plan that was laid out for more shards than the configuration now names.
    alone = [(unit,) for unit in sorted(missing - grouped)]
    return tuple(task for task in (*tasks, *alone) if task)


def failures_of(run: Run, key: str) -> list[dict[str, Any]]:
    """The notes of failed tasks of the newest submission of a key."""
    newest = Ledger(run).latest().get(key)
    if newest is None:
        return []
    folder = run.job_folder(newest.key, newest.number)
    return [read_json(path) for path in sorted(folder.glob("failure*.json"))]


def move_dependents(ledger: Ledger, slurm: Slurm, key: str) -> None:
    """Make the jobs that wait for a key wait for its newest submission."""
    latest = ledger.latest()
    waiting = [s for s in latest.values() if s.job_ids and any(k == key for k, _ in s.after)]
    pending = {t.job_id for t in slurm.queue(i for s in waiting for i in s.job_ids) if t.waits}
    newest = {k: s.job_ids for k, s in latest.items()}
    for submission in waiting:
        for job_id in pending.intersection(submission.job_ids):
            slurm.set_dependency(job_id, dependency_of(submission.after, newest))


def _finished_rows(run: Run, config: RunConfig, step: Step) -> int:
    with phase_of(step).open(run, config) as phase:
        return rows_finished(phase)


def _extra_options(
    config: RunConfig, failures: Sequence[dict[str, Any]], repair: Repair
) -> Options:
    """Off the nodes that cannot do the work, and not before the world may have changed."""
    extra: Options = {}
    bad_nodes = {f["host"] for f in failures if f["exit_code"] == BadNodeError.exit_code}
    if bad_nodes:
        extra["exclude"] = ",".join(sorted(bad_nodes))
    if any(failure["exit_code"] in _MENDED_BY_TIME for failure in failures):
        extra["begin"] = f"now+{config.cluster.repair_pause_s * 2**repair.in_vain}"
    return extra


@dataclass(frozen=True)
class _Resubmission:
    """An array of missing shards, and a collect job behind it."""

    run: Run
    config: RunConfig
    closing: Submission
    step: Step
    tasks: Tasks
    repair: Repair
    extra: Options

    def patiently(self) -> None:
        """Submit both, and move the jobs that wait; where Slurm does not answer, again and again.

        Raises:
            SlurmUnreachableError: it has not answered for a quarter of an hour.
        """
        slurm, deadline = Slurm(), time.monotonic() + _OUTAGE_S
        while True:
            try:
                settle_all(self.run, slurm)
                self._submit(slurm)
                move_dependents(Ledger(self.run), slurm, self.closing.key)
                return
            except SlurmUnreachableError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_OUTAGE_PAUSE_S)

    def _submit(self, slurm: Slurm) -> None:
        dispatcher = Dispatcher(
            self.run,
            self.config,
            max_array_size=slurm.max_array_size(),
            chain=self.closing.chain,
        )
        _, stage, phase = self.step
        key = f"{stage}.{phase}"
        kind = phase_of(self.step).kind
        array = ChainJob(key, kind, (("shards", stage, phase),), (), self.tasks)
        steps = self.closing.steps[self.closing.steps.index(self.step) :]
        collect = ChainJob(self.closing.key, "cpu", steps, ((key, "afterany"),))
        waits_for = {}
        if self.tasks:  # a process that Slurm had lost may have finished its shard meanwhile
            waits_for = {key: self._once(dispatcher, array, {}, self.extra).job_ids}
        self._once(dispatcher, collect, waits_for, {})

    def _once(
        self,
        dispatcher: Dispatcher,
        job: ChainJob,
        waits_for: Mapping[str, Sequence[str]],
        extra: Options,
    ) -> Submission:
        """Submit a job, unless a try before an outage has done so."""
        newest = dispatcher.ledger.latest().get(job.key)
        this = (self.closing.chain, self.repair)
        if newest is not None and newest.job_ids and (newest.chain, newest.repair) == this:
            return newest
        return dispatcher.submit(job, waits_for, repair=self.repair, extra=extra)


def _check_may_submit(run: Run, tasks: Tasks, step: Step) -> None:
    if not Slurm().can_submit():
        raise _cannot_submit(run, tasks, step, "there is no sbatch")


def _cannot_submit(run: Run, tasks: Tasks, step: Step, why: str) -> TryAgainError:
    return TryAgainError(
        f"{len(tasks)} tasks of {step[1]} are missing, and this node cannot submit jobs ({why})",
        fix=f"On a login node: medtrain resume {run.root}",
    )


def _check_failures(run: Run, failures: Sequence[dict[str, Any]]) -> None:
    for failure in failures:
        if failure["exit_code"] in _NOT_WORTH_REPEATING:
            again = f"Then: medtrain resume {run.root}"
            fix = f"{failure['fix']} {again}" if failure["fix"] else again
            raise from_exit_code(failure["exit_code"], failure["message"], fix)


def _given_up(
    run: Run, step: Step, tasks: Tasks, rounds: int, failures: Sequence[dict[str, Any]]
) -> MedtrainError:
    last = f"; the last error: {failures[-1]['message']}" if failures else ""
    message = f"{len(tasks)} tasks of {step[1]} are missing after {rounds} rounds of repair{last}"
    fix = (
        f"Look at: medtrain logs {run.root} {step[1]}. When the cause is mended, "
        f"medtrain resume {run.root} goes on; finished rows are kept."
    )
    code = failures[-1]["exit_code"] if failures else TryAgainError.exit_code
    return from_exit_code(code, message, fix)
