"""The one table that status and watch show.

a row a stage, in columns that are left out where they would be empty; below a row what is worth
saying of it; below the table what goes on, and what does not go as it should
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from medtrain.status import words
from medtrain.status.facts import Shards, StageStatus

if TYPE_CHECKING:
    from medtrain.status.look import RunStatus

_WIDE = 100
"""Characters from which shards and GPU-hours have columns of their own."""
_STYLES = {
    "done": "green", "running": "cyan", "queued": "blue", "begun": "cyan", "stopped": "yellow",
    "failed": "bold red", "stale": "yellow", "waits": "yellow", "missing": "dim",
}  # fmt: skip
_WORDS = {"missing": "to do", "stale": "outdated"}


class StatusTable:
    """Draws a RunStatus."""

    def __init__(self, status: RunStatus) -> None:
        self.status = status

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = options.max_width >= _WIDE
        rows: list[tuple[StageStatus | None, list[Any]]] = []
        for stage in self.status.stages:
            rows.append((stage, _cells(stage, wide)))
            if stage.state != "done":
                rows += [(None, _part_cells(name, part)) for name, part in stage.parts]
        yield Text(f"run {self.status.run.name}", style="bold")
        table = _table([cells for _, cells in rows])
        lines = console.render_lines(table, options.update(height=None), pad=False)
        yield from _line(lines[0])
        for (about, _), line in zip(rows, lines[1:], strict=True):
            yield from _line(line)
            if about is not None and (said := _remark(about, wide)):
                yield Padding(Text(said, style="dim"), (0, 0, 0, 4), expand=False)
        yield Text()
        yield from self._below()

    def _below(self) -> RenderResult:
        advice = self.status.advice
        yield Text(advice.happening)
        gpu = self.status.gpu
        if gpu is not None and gpu.spent_s:
            wasted = f", {words.hours(gpu.wasted_s)} of them wasted" if gpu.wasted_s else ""
            yield Text(f"GPU-hours: {words.hours(gpu.spent_s)} spent{wasted}", style="dim")
        for problem in advice.problems:
            yield Text.assemble((f"{problem.stage}  ", "bold red"), problem.message)
            if problem.fix:
                yield Padding(
                    Text.assemble(("fix  ", "bold green"), problem.fix), (0, 0, 0, 2), expand=False
                )


def _line(segments: list[Segment]) -> RenderResult:
    yield from segments
    yield Segment.line()


_COLUMNS = ("stage", "state", "done", "rate", "time", "shards", "GPU-h", "")
_RIGHT = {"done", "rate", "time", "GPU-h"}


def _table(rows: list[list[Any]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    shown = [i for i, name in enumerate(_COLUMNS) if i < 2 or any(str(row[i]) for row in rows)]
    for i in shown:
        name = _COLUMNS[i]
        table.add_column(
            name,
            justify="right" if name in _RIGHT else "left",
            no_wrap=True,
            overflow="ellipsis",
            ratio=None if name else 1,
            # The last column gives way, the others do not.
            min_width=max(len(name), *(len(str(row[i])) for row in rows)) if name else None,
        )
    for row in rows:
        table.add_row(*(row[i] for i in shown))
    return table


def _cells(stage: StageStatus, wide: bool) -> list[Any]:
    state = Text(_WORDS.get(stage.state, stage.state), style=_STYLES[stage.state])
    done = stage.state == "done"
    amount = None if done else stage.amount
    return [
        stage.name,
        state,
        words.amount(amount),
        words.rate(amount.per_s) if amount else "",
        _time(stage),
        _shard_marks(stage.shards) if stage.shards and wide and not done else Text(),
        words.hours(stage.gpu.spent_s) if stage.gpu and stage.gpu.spent_s and wide else "",
        Text(stage.note, style="dim" if done else "") if done or wide else Text(),
    ]


def _time(stage: StageStatus) -> Text:
    """How long it took, will take, or has been running."""
    if stage.state == "done":
        return Text(words.duration(stage.seconds), style="dim")
    if stage.amount and stage.amount.eta_s is not None:
        return Text(f"{words.duration(stage.amount.eta_s)} left")
    return Text(words.duration(stage.jobs.elapsed_s) if stage.jobs and stage.jobs.elapsed_s else "")


def _part_cells(name: str, amount: Any) -> list[Any]:
    cells: list[Any] = [Text(f"  {name}", style="dim"), Text(), words.amount(amount)]
    return [*cells, words.rate(amount.per_s), "", Text(), "", Text()]


def _shard_marks(shards: Shards) -> Text:
    """`32▶ 556… 2✗ 410✓`."""
    parts = [
        (shards.running, "▶", "cyan"), (shards.waiting, "…", "blue"),
        (shards.failed, "✗", "red"), (shards.done, "✓", "green"),
    ]  # fmt: skip
    shown = [(f"{number:,}{mark}", style) for number, mark, style in parts if number]
    return Text(" ").join(Text(text, style=style) for text, style in shown)


def _remark(stage: StageStatus, wide: bool) -> str:
    """What has no place in the row."""
    jobs, said = stage.jobs, []
    if stage.state == "done":
        return ""
    if not wide and stage.note:
        said.append(stage.note)
    if stage.shards and not wide:
        said.append(words.shards(stage.shards))
    if jobs and jobs.waiting and jobs.reason not in ("", "Dependency"):
        start = f", from about {words.moment(jobs.starts_at)}" if jobs.starts_at else ""
        said.append(f"waiting: {jobs.sentence} ({jobs.reason}){start}")
    if jobs and jobs.requeues:
        said.append(f"requeued {'once' if jobs.requeues == 1 else f'{jobs.requeues} times'}")
    if jobs and jobs.repair_round:
        said.append(f"repair round {jobs.repair_round}")
    if stage.errors:
        said.append(f"{stage.errors:,} rows with errors")
    if stage.quarantined:
        said.append(f"{stage.quarantined:,} rows given up: they ended their process")
    if stage.gpu and stage.gpu.wasted_s >= 36:
        said.append(f"{words.hours(stage.gpu.wasted_s)} GPU-h wasted")
    return "; ".join(said)
