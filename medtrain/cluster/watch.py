"""`medtrain watch`: the board again and again, until nothing more will happen by itself.

On a terminal the table is redrawn in place, and its last state stays on the screen. In a log there
is one key=value line for each stage that has changed. While Slurm does not answer, the files go on
being shown.
"""

from __future__ import annotations

import time
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from medtrain.cluster.board import Board
from medtrain.config import RunConfig
from medtrain.console import LOG_LINE_EVERY_S, Console, key_value_line
from medtrain.run import Run
from medtrain.status import RunStatus, StageStatus, words

_GROWING = {"done", "total", "shards_running", "shards_waiting", "shards_done"}
_LOOKS_UNTIL_OVER = 2
"""A job may have ended a moment before the one it submits is in the ledger."""


def watch_run(
    run: Run, config: RunConfig, console: Console, *, every_s: float = 5.0, once: bool = False
) -> int:
    """Show how a run goes on; returns the exit code.

    0: the run is done, or a person stopped watching. 1: nothing runs and nothing is queued, and the
    run is not done. With `once`: 0 while something runs or is queued, too.

    Raises:
        DataError: the ledger, or a receipt, is damaged.
    """
    board = Board(run, config)
    status = board.look()
    if once:
        console.show(status)
        _say_next(console, status)
        return 0 if status.done or _goes_on(status) else 1
    try:
        if console.on_terminal:
            status = _on_terminal(board, status, console, every_s)
            _say_next(console, status)
        else:
            status = _in_log(board, status, every_s)
    except KeyboardInterrupt:
        return 0
    return 0 if status.done else 1


def _on_terminal(board: Board, status: RunStatus, console: Console, every_s: float) -> RunStatus:
    still = 0
    # The table is drawn when there is something new, and by nobody else.
    with Live(console=console.rich, auto_refresh=False) as live:
        try:
            while not status.done and still < _LOOKS_UNTIL_OVER:
                live.update(_screen(status, every_s), refresh=True)
                time.sleep(every_s)
                status = board.look()
                still = 0 if _goes_on(status) else still + 1
        finally:
            # What is left on the screen says nothing of a next look.
            live.update(status, refresh=True)
    return status


def _in_log(board: Board, status: RunStatus, every_s: float) -> RunStatus:
    still, teller = 0, _Teller()
    while True:
        teller.tell(status)
        if status.done or still >= _LOOKS_UNTIL_OVER:
            return status
        time.sleep(every_s)
        status = board.look()
        still = 0 if _goes_on(status) else still + 1


def _goes_on(status: RunStatus) -> bool:
    """Whether something may still happen by itself."""
    return status.alive or status.slurm == "silent"


def _screen(status: RunStatus, every_s: float) -> RenderableType:
    """The table, and below it that it moves."""
    note = f"{time.strftime('%H:%M:%S')}, every {words.duration(every_s)}; Ctrl-C ends the watch"
    command = Text()
    if status.advice.needs_person:
        command = Text.assemble(("next  ", "bold"), status.next_command)
    return Group(status, command, Text(note, style="dim"))


def _say_next(console: Console, status: RunStatus) -> None:
    # Outside the table, which would break a path that is longer than a line.
    if not console.silent:
        console.rich.print(f"\nnext: {status.next_command}", soft_wrap=True, markup=False)


class _Teller:
    """Tells a log what is new: of numbers that grow every half minute, of the rest at once."""

    def __init__(self) -> None:
        self._said: dict[str, dict[str, Any]] = {}
        self._said_at: dict[str, float] = {}

    def tell(self, status: RunStatus) -> None:
        """A line for each stage of which something else is true than was said last."""
        for stage in status.stages:
            if stage.name in self._said or stage.state != "missing":
                self._say("stage", stage.name, {"stage": stage.name, **_line_of(stage)})
        if status.advice.needs_person or status.done or status.slurm == "silent":
            advice = status.advice
            whole = {"happening": advice.happening, "next": advice.command}
            self._say("run", status.run.name, {"run": status.run.name, **whole})

    def _say(self, event: str, about: str, line: dict[str, Any]) -> None:
        before = self._said.get(about, {})
        changed = {key for key in line.keys() | before.keys() if line.get(key) != before.get(key)}
        recent = time.monotonic() - self._said_at.get(about, float("-inf")) < LOG_LINE_EVERY_S
        if not changed or (changed <= _GROWING and recent):
            return
        self._said[about], self._said_at[about] = line, time.monotonic()
        print(key_value_line(event, line), flush=True)


def _line_of(stage: StageStatus) -> dict[str, Any]:
    line: dict[str, Any] = {"state": stage.state}
    if stage.state != "done" and stage.amount is not None:
        line |= {"done": stage.amount.done, "total": stage.amount.total}
    if stage.state != "done" and stage.shards is not None:
        shards = stage.shards
        line |= {
            "shards_running": shards.running,
            "shards_waiting": shards.waiting,
            "shards_failed": shards.failed,
            "shards_done": shards.done,
        }
    jobs = stage.jobs
    if jobs is not None and jobs.reason:
        line["reason"] = jobs.reason
    if jobs is not None and jobs.requeues:
        line["requeues"] = jobs.requeues
    if stage.silent:
        line["silent"] = stage.silent
    if stage.state == "failed":
        line["why"] = stage.failure.message if stage.failure else jobs.ended if jobs else ""
    return line
