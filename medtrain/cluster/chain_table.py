"""How a chain looks: the table of queued jobs, and the scripts and the graph of a dry run."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from rich.table import Table

from medtrain.cluster.chain import ChainJob
from medtrain.cluster.dispatch import Script
from medtrain.cluster.ledger import Condition, Step
from medtrain.cluster.site import resources_of
from medtrain.cluster.submit import Queued
from medtrain.config import RunConfig
from medtrain.console import Console


def queued_table(queued: Queued) -> Table:
    """A row a submission: its id, what it does, what it waits for."""
    table = _table("job", "id", "tasks", "does", "after")
    for s in queued.submitted:
        table.add_row(
            s.key, " ".join(s.job_ids), _tasks(len(s.tasks)), does(s.steps), _after(s.after)
        )
    return table


def show_dry_run(
    jobs: Sequence[tuple[ChainJob, list[Script]]], console: Console, config: RunConfig
) -> None:
    """Every script in full, then the graph."""
    if not jobs:
        console.event("dry_run", "Nothing to queue: every chosen stage is done")
        return
    for job, scripts in jobs:
        for number, script in enumerate(scripts):
            part = f" (array {number + 1} of {len(scripts)})" if len(scripts) > 1 else ""
            print(f"##### {job.key}{part}")
            if script.command:
                print(f"# {shlex.join(script.command)}")
            print(script.text.rstrip() + "\n")
            if script.sourced:
                print(f"##### {job.key}{part}: setup.sh\n{script.sourced}")
    console.show(chain_table([job for job, _ in jobs], config))


def chain_table(jobs: Sequence[ChainJob], config: RunConfig) -> Table:
    """A row a job: what it does, what it asks for, what it waits for."""
    table = _table("job", "tasks", "nodes × GPUs", "hours", "does", "after")
    for job in jobs:
        wanted = resources_of(config, job.kind)
        hours = f"{wanted.time_min / 60:.3g}" if wanted.time_min else ""
        table.add_row(job.key, _tasks(len(job.tasks)), f"{wanted.nodes} × {wanted.gpus}",
                      hours, does(job.steps), _after(job.after))  # fmt: skip
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        right = column in ("tasks", "hours")
        # Names and ids are copied; what a job does can give way.
        whole = column in ("job", "id", "tasks", "hours")
        table.add_column(column, justify="right" if right else "left", no_wrap=whole,
                         overflow="fold" if whole else "ellipsis")  # fmt: skip
    return table


def _tasks(count: int) -> str:
    return f"{count:,}" if count else ""


def does(steps: Sequence[Step]) -> str:
    """What a job does, in words."""
    words = {"run": "{s}", "train": "train {s}", "open": "open {p}", "shards": "{p} of {s}",
             "close": "collect {p}"}  # fmt: skip
    return ", ".join(words[verb].format(s=stage, p=phase) for verb, stage, phase in steps)


def _after(after: Sequence[tuple[str, Condition]]) -> str:
    ends = {"afterok": "", "afterany": " (however it ends)"}
    return ", ".join(f"{key}{ends[condition]}" for key, condition in after)
