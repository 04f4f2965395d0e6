"""How a plan looks: a row a job, the total, what each training needs, assumptions, warnings.

What to type comes after it and not from here: a table's width would break a long command.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from medtrain.cluster.chain_table import does
from medtrain.cluster.training_table import about_memory, training_views
from medtrain.cluster.workload import duration, words

if TYPE_CHECKING:
    from medtrain.cluster.plan import PlannedJob, RunPlan

_RIGHT = ("tasks", "a task takes", "GPU-hours")


def plan_view(plan: RunPlan) -> Group:
    """Everything of a plan, for a person."""
    parts: list[Table | Text] = [_table(plan), Text(), Text(_total(plan), style="bold")]
    for stage in plan.training:
        parts += [Text(), *training_views(stage)]
    paths = {f"{job.kind}: {job.path}": None for job in plan.to_do if job.path}
    parts += [Text(), *map(Text, paths)] if paths else []
    if plan.to_do:
        parts += [Text(), *(Text(line, style="dim") for line in plan.assumptions)]
    if any(stage.fitting for stage in plan.training):
        parts.append(Text(about_memory(), style="dim"))
    parts += [Text.assemble(("! ", "yellow"), line) for line in plan.warnings]
    return Group(*parts)


def _table(plan: RunPlan) -> Table:
    columns = ("job", "state", "does", "tasks", "nodes × GPUs", *_RIGHT[1:], "")
    rows = [(job.state, _cells(job)) for job in plan.jobs]
    table = Table(box=None, pad_edge=False)
    for place, column in enumerate(columns):
        # On a narrow terminal words give way, names and figures do not.
        widest = max(len(column), *(len(cells[place]) for _, cells in rows))
        table.add_column(
            column,
            justify="right" if column in _RIGHT else "left",
            overflow="ellipsis",
            no_wrap=True,
            min_width=None if column in ("does", "") else widest,
        )
    for state, cells in rows:
        table.add_row(*cells, style="dim" if state == "done" else None)
    return table


def _cells(job: PlannedJob) -> list[str]:
    if job.state == "done":
        took = duration(job.task_s) if job.task_s is not None else ""
        return [job.key, "done", does(job.steps), "", "", took, "", "measured"]
    origin = "measured" if job.basis == "measured" else ""
    note = ", ".join(part for part in (origin, job.note) if part)
    return [
        job.key, job.state, does(job.steps), f"{job.tasks:,}", f"{job.nodes} × {job.gpus}",
        _time(job), _hours(job), note,
    ]  # fmt: skip


def _time(job: PlannedJob) -> str:
    if job.basis == "short":
        return "minutes"
    if job.task_s is None:
        return "?"
    return duration(job.task_s) if job.basis == "measured" else f"~{duration(job.task_s)}"


def _hours(job: PlannedJob) -> str:
    if job.gpu_hours is None:
        return "?"
    return words(job.gpu_hours) if job.gpu_hours else ""


def _total(plan: RunPlan) -> str:
    jobs = plan.to_do
    if not jobs:
        return "Every chosen stage is done: nothing would be queued."
    tasks = sum(job.tasks for job in jobs)
    count = (
        f"{len(jobs)} job{'' if len(jobs) == 1 else 's'}, {tasks:,} task{'' if tasks == 1 else 's'}"
    )
    if not any(job.gpus for job in jobs):
        return f"{count}, no GPUs"
    if plan.unknown:
        least = f"about {words(plan.gpu_hours)} GPU-hours and " if plan.gpu_hours else ""
        return f"{count}, {least}an unknown number for {', '.join(plan.unknown)}"
    return f"{count}, about {words(plan.gpu_hours)} GPU-hours"
