"""The verbs that know Slurm: plan, submit, resume, cancel, collect, watch, logs, doctor, and what a
job calls. Everything is imported when a verb runs."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from medtrain.arguments import (
    AsJson,
    ConfigPath,
    Forced,
    From,
    Only,
    Overrides,
    RunPath,
    Until,
    load,
)

if TYPE_CHECKING:
    from medtrain.cluster.submit import Queued
    from medtrain.config import RunConfig
    from medtrain.console import Console
    from medtrain.run import Run

job = typer.Typer(
    help="What batch scripts call; see slurm/train.sbatch and slurm/shards.sbatch.",
    no_args_is_help=True,
)
StageArgument = Annotated[str, typer.Argument(metavar="STAGE")]


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    for verb in (plan, submit, resume, cancel, collect, watch, logs, doctor):
        app.command()(verb)
    app.add_typer(job, name="job", hidden=True)


def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    start: From = None,
    until: Until = None,
    only: Only = None,
    as_json: AsJson = False,
    check: Annotated[
        bool, typer.Option("--check", help="Fail (exit code 64) if a training does not fit.")
    ] = False,
) -> None:
    """Show what `submit` would queue, with GPU-hours and memory of a GPU; touch nothing."""
    import json

    from medtrain.cluster.plan import make_plan
    from medtrain.console import Console
    from medtrain.selection import Selection

    loaded, a_run = load(config, overrides)
    typed = " ".join([config, *map(shlex.quote, overrides or [])])
    planned = make_plan(a_run, loaded, Selection(start, until, only), typed)
    if as_json:
        typer.echo(json.dumps(planned.to_json(), indent=2))
    else:
        Console().show(planned)
        # Outside the table, which would break a command that is longer than a line.
        for number, command in enumerate(planned.commands):
            typer.echo(f"\nnext: {command}" if number == 0 else f"then: {command}")
    if check:
        planned.check()


def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    start: From = None,
    until: Until = None,
    only: Only = None,
    force: Forced = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print every script and the jobs; touch nothing.")
    ] = False,
) -> None:
    """Queue the run on Slurm: what is neither done nor queued."""
    from medtrain.console import Console, quiet_libraries
    from medtrain.selection import Selection

    quiet_libraries()
    loaded, a_run = load(config, overrides)
    selection = Selection(start, until, only, tuple(force or ()))
    if dry_run:
        from medtrain.cluster import submit as chain
        from medtrain.cluster.chain_table import show_dry_run

        quiet = Console(quiet=True)
        show_dry_run(chain.dry_run(a_run, loaded, quiet, selection), Console(), loaded)
        return
    from medtrain.cluster.submit import submit_chain

    # The log has a directory once there is a run; until then there is nothing to write down.
    console = Console(a_run.log)
    _say_queued(submit_chain(a_run, loaded, console, selection), a_run, console)


def resume(run: RunPath, overrides: Overrides = None) -> None:
    """Queue what is missing of a run, as it was submitted; `cluster.key=value` changes how."""
    from medtrain.cluster.submit import resume_chain
    from medtrain.console import Console, quiet_libraries

    quiet_libraries()
    loaded, a_run = _existing(run, overrides)
    console = Console(a_run.log)
    _say_queued(resume_chain(a_run, loaded, console), a_run, console)


def cancel(run: RunPath) -> None:
    """Cancel the jobs of a run; what is finished is kept."""
    from medtrain.cluster.submit import cancel_chain
    from medtrain.console import Console

    _, a_run = _existing(run, None)
    console = Console(a_run.log)
    gone = cancel_chain(a_run)
    for submission in gone:
        console.event("cancelled", f"{submission.key}: {' '.join(submission.job_ids)}",
                      job=submission.key, ids=",".join(submission.job_ids))  # fmt: skip
    console.event("cancel", f"{len(gone)} jobs cancelled; medtrain resume {a_run.root} goes on",
                  jobs=len(gone))  # fmt: skip


def collect(
    run: ConfigPath,
    stage: StageArgument,
    overrides: Overrides = None,
) -> None:
    """Collect the shards of an array that was submitted by hand; finish the stage."""
    from medtrain.cluster.by_hand import collect_stage
    from medtrain.console import Console, quiet_libraries

    quiet_libraries()
    loaded, a_run = _existing(run, overrides)
    collect_stage(a_run, loaded, stage, Console(a_run.log))


def watch(
    run: RunPath,
    every: Annotated[
        float, typer.Option("--every", min=1, metavar="SECONDS", help="Between two looks.")
    ] = 10.0,
) -> None:
    """Show where a run stands, until it is done."""
    from medtrain.cluster.watch import watch_run
    from medtrain.console import Console

    loaded, a_run = _existing(run, None)
    raise typer.Exit(watch_run(a_run, loaded, Console(), every_s=every))


def logs(
    run: RunPath,
    stage: Annotated[Optional[str], typer.Argument(metavar="[STAGE]")] = None,  # noqa: UP045
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on with new lines.")] = False,
    lines: Annotated[int, typer.Option("-n", "--lines", min=1, help="Last lines to show.")] = 40,
) -> None:
    """Show the newest logs of a run or of one stage."""
    from medtrain.cluster.logs import show_logs
    from medtrain.console import Console

    _, a_run = load(run, None)
    show_logs(a_run, stage, follow=follow, lines=lines, console=Console())


def doctor(
    config: Annotated[Optional[str], typer.Argument(metavar="[CONFIG]")] = None,  # noqa: UP045
    overrides: Overrides = None,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Also Slurm, with a short job on two nodes.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Look at this machine, and the cluster, for what a run needs."""
    import json
    from pathlib import Path

    from medtrain.cluster.doctor import run_doctor
    from medtrain.console import Console, quiet_libraries

    quiet_libraries()
    loaded, directory = None, Path()
    if config is not None:
        loaded, a_run = load(config, overrides)
        directory = a_run.root.parent
    console = Console(quiet=as_json)
    report = run_doctor(loaded, console, cluster=cluster, directory=directory)
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=2))
    else:
        report.show(console)
    raise typer.Exit(report.exit_code)


@job.command("train")
def job_train(stage: StageArgument, config: ConfigPath, overrides: Overrides = None) -> None:
    """Train on every node of this job (slurm/train.sbatch)."""
    from medtrain.cluster.train_job import train_job

    loaded, a_run = load(config, overrides)
    _only_trained(stage)
    train_job(a_run, loaded, stage, [config, *(overrides or [])])


@job.command("shards")
def job_shards(stage: StageArgument, config: ConfigPath, overrides: Overrides = None) -> None:
    """Compute the shards of this array task (slurm/shards.sbatch)."""
    from medtrain.cluster.by_hand import shards_of_this_task
    from medtrain.console import Console, quiet_libraries

    quiet_libraries()
    loaded, a_run = load(config, overrides)
    shards_of_this_task(a_run, loaded, stage, Console(a_run.log))


def _existing(run: str, overrides: list[str] | None) -> tuple[RunConfig, Run]:
    """A run that has been begun.

    Raises:
        ConfigError: there is none yet.
    """
    from medtrain.errors import ConfigError

    loaded, a_run = load(run, overrides)
    if not a_run.stages.is_dir():
        raise ConfigError(
            f"There is no run at {a_run.root}",
            fix=f"Begin it: medtrain submit {run}, or medtrain run {run}.",
        )
    return loaded, a_run


def _only_trained(stage: str) -> None:
    from medtrain.errors import ConfigError

    if stage not in ("sft", "dpo"):
        raise ConfigError(f"{stage} is no training stage", fix="Valid: sft, dpo")


def _say_queued(queued: Queued, a_run: Run, console: Console) -> None:
    from medtrain.cluster.chain_table import queued_table

    if queued.submitted:
        console.show(queued_table(queued))
    for submission in queued.submitted:
        fields: dict[str, Any] = {"tasks": len(submission.tasks)} if submission.is_array else {}
        console.log_only("queued", job=submission.key, ids=",".join(submission.job_ids), **fields)
    held = f"; queued before: {', '.join(queued.held)}" if queued.held else ""
    number = len(queued.submitted)
    what = f"{number} job{'' if number == 1 else 's'} queued" if number else "nothing to queue"
    console.event("submit", f"{what}{held}", jobs=number)
    if queued.submitted or queued.held:
        typer.echo(f"\nnext: medtrain watch {a_run.root}", file=sys.stdout)
