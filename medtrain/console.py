"""What a person sees: rich on a terminal, one key=value line an event in a log.

event(name, key=value …) → a styled line or `time=… event=… key=value`
progress(total)          → a bar with ETA, or a line every half minute
Only rank zero speaks. Whatever the screen shows, the run's log file gets the key=value line.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

LOG_LINE_EVERY_S = 30.0
LOG_WIDTH = 144
"""Of a table in a log, in characters."""

_MARKS = {"start": ("▶", "bold cyan"), "done": ("✓", "green"), "skip": ("·", "dim"),
          "warn": ("!", "yellow"), "info": (" ", "")}  # fmt: skip


def is_rank_zero() -> bool:
    """Whether this process speaks and keeps the books among those of a distributed launch."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) or 0) == 0


def key_value_line(event: str, fields: dict[str, Any]) -> str:
    """`time=… event=… key=value …`, values quoted where a space or quote would split them."""
    stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    parts = [f"time={stamp}", f"event={event}"]
    return " ".join(parts + [f"{key}={_plain(value)}" for key, value in fields.items()])


def _plain(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    if text and not any(c.isspace() or c in '"=' or not c.isprintable() for c in text):
        return text
    return json.dumps(text, ensure_ascii=False)


class Console:
    """The one voice of a process."""

    def __init__(self, log_file: Path | None = None, *, quiet: bool = False) -> None:
        self.rich = RichConsole(stderr=False, highlight=False)
        self.on_terminal = self.rich.is_terminal
        if not self.on_terminal:
            self.rich.width = LOG_WIDTH
        self.silent = quiet or not is_rank_zero()
        self._log_file = log_file if is_rank_zero() else None

    def event(self, name: str, message: str = "", *, mark: str = "info", **fields: Any) -> None:
        """Tell of one event.

        `message` is for a terminal and may be a sentence; `fields` are for the log. Row texts must
        be in neither.
        """
        line = key_value_line(name, {**fields, **({"message": message} if message else {})})
        self._append(line)
        if self.silent:
            return
        if self.on_terminal:
            symbol, style = _MARKS[mark]
            shown = message or " ".join(f"{k}={_plain(v)}" for k, v in fields.items())
            self.rich.print(Text(f"{symbol} {shown}", style=style), soft_wrap=False)
        else:
            print(line, flush=True)

    def log_only(self, name: str, **fields: Any) -> None:
        """Write an event to the run's log file; the screen shows it in another form."""
        self._append(key_value_line(name, fields))

    def warn(self, name: str, message: str, **fields: Any) -> None:
        """Tell of something a person should look at."""
        self.event(name, message, mark="warn", level="warning", **fields)

    def show(self, renderable: Any) -> None:
        """Print a result that draws itself (a table, a panel)."""
        if not self.silent:
            self.rich.print(renderable)

    @contextmanager
    def progress(self, name: str, total: int, unit: str = "rows") -> Iterator[ProgressTask]:
        """A bar on a terminal, a line every half minute in a log."""
        task = ProgressTask(self, name, total, unit)
        with task:
            yield task

    def _append(self, line: str) -> None:
        if self._log_file is not None and self._log_file.parent.is_dir():
            with self._log_file.open("a", encoding="utf-8") as handle:
                handle.write(line + "\n")


class ProgressTask:
    """One piece of countable work: call `advance` or `update`, with figures worth showing."""

    def __init__(self, console: Console, name: str, total: int, unit: str) -> None:
        self._console, self._name, self._unit = console, name, unit
        self.total, self.done = total, 0
        self._started = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> ProgressTask:
        if self._console.on_terminal and not self._console.silent:
            self._bar = Progress(
                TextColumn("  {task.description}", table_column=Column(no_wrap=True)),
                BarColumn(bar_width=20),
                MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=9)),
                TextColumn(self._unit, table_column=Column(no_wrap=True)),
                TimeElapsedColumn(table_column=Column(no_wrap=True, min_width=7)),
                TextColumn("eta", table_column=Column(no_wrap=True)),
                TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
                # On a narrow terminal the figures give way, the time does not.
                TextColumn(
                    "[dim]{task.fields[figures]}",
                    table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
                ),
                console=self._console.rich,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(self._name, total=self.total, figures="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, amount: int = 1, **figures: float) -> None:
        """`amount` more is done."""
        self.update(self.done + amount, **figures)

    def update(self, done: int, **figures: float) -> None:
        """`done` of the total is done; `figures` (a loss, a rate) are shown beside it."""
        self.done = done
        if self._bar is not None and self._task is not None:
            text = "  ".join(f"{key} {value:.4g}" for key, value in figures.items())
            self._bar.update(self._task, completed=done, figures=text)
            return
        now = time.monotonic()
        if now - self._last_line >= LOG_LINE_EVERY_S:
            self._last_line = now
            elapsed = now - self._started
            eta_s = round(elapsed / done * (self.total - done)) if done else None
            fields: dict[str, Any] = {"task": self._name, "done": done, "total": self.total}
            if eta_s is not None:
                fields["eta_s"] = eta_s
            self._console.event("progress", **{**fields, **figures})


def show_error(message: str, fix: str) -> None:
    """One message and its fix on standard error."""
    console = RichConsole(stderr=True, highlight=False, soft_wrap=True)
    if console.is_terminal:
        console.print(Text.assemble(("error  ", "bold red"), message))
        if fix:
            console.print(Text.assemble(("fix    ", "bold green"), fix))
        return
    print(f"error: {message}", file=sys.stderr)
    if fix:
        print(f"fix: {fix}", file=sys.stderr)


def quiet_libraries() -> None:
    """Keep third-party bars, advice and warnings off the screen; errors still pass.

    Also lets OpenMP's threads sleep instead of spin while they wait: on a machine that is busy with
    something else, spinning made a step of a small model four times slower.
    Call it before torch, transformers, datasets or bitsandbytes are imported.
    """
    import logging
    import warnings

    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "DATASETS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "TOKENIZERS_PARALLELISM": "true",
        "TQDM_DISABLE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "PYTHONWARNINGS": "ignore",
        "OMP_WAIT_POLICY": "PASSIVE",
    }.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    for logger in ("bitsandbytes", "accelerate", "deepspeed", "trl", "peft", "torch.distributed"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    # DeepSpeed sets its own level when it is imported; a filter stays.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
