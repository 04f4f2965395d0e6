"""`medtrain logs`: the newest logs of a stage, wherever its job, its launcher or its array wrote.

stage → logs/<stage>.launch.log, and the folder of its newest submission (submitit's
`%A_%a_0_log.out` and `.err`, or plain `.log` files) → the last lines, failed tasks first; with
`follow` what is added, new files too, until Ctrl-C. Without a stage: what the run says of itself.
What a log holds is somebody else's text: control characters do not reach the terminal.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from rich.text import Text

from medtrain.cluster.ledger import Ledger, Submission
from medtrain.console import Console
from medtrain.errors import ConfigError
from medtrain.run import Run
from medtrain.stages import STAGES

_LOG_SUFFIXES = {".log", ".out", ".err"}
_MOST_FILES = 8
"""Of an array, whose last lines are shown; all are followed."""
_POLL_S = 0.5
_FILES_EVERY_S = 3.0
_BLOCK = 1 << 16
_MOST_BYTES = 1 << 22
"""Read at a time; a progress bar may have written one line of any length."""

# CSI and OSC sequences whole, so that no `[31m` stays behind; then every other control character.
_SEQUENCE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[@-_]")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_SUBMITIT = re.compile(r"^(?P<job>\d+)(?:_(?P<task>\d+))?_\d+_log$")
_PLAIN = re.compile(r"^(?P<job>\d+)(?:_(?P<task>\d+))?$")


def show_logs(run: Run, stage: str | None, *, follow: bool, lines: int, console: Console) -> None:
    """Show the last lines of a run's or a stage's logs.

    Args:
        run: whose logs.
        stage: its name; None for the run's own log.
        follow: go on with what is added, until Ctrl-C.
        lines: how many of each log.
        console: gets the lines.

    Raises:
        ConfigError: there is no such stage, or it has no log yet and nobody waits for one.
    """
    _check(stage)
    found = log_files(run, stage)
    # What is added from now on is new, also while the lines before it are being shown.
    ends = {path: path.stat().st_size for path in found}
    if not found and not follow:
        raise ConfigError(
            f"{stage or run.name} has no log yet",
            fix=f"medtrain logs {run.root} -f waits for one; medtrain status {run.root} says what "
            "runs.",
        )
    shown = found[:_MOST_FILES]
    printer = _Printer(console, run)
    # The most important last, where a terminal ends.
    for path in reversed(shown):
        printer.show(path, last_lines(path, lines, ends[path]), many=len(found) > 1)
    if len(found) > len(shown):
        console.show(Text(f"{len(found) - len(shown)} more logs in {shown[-1].parent}", "dim"))
    if follow:
        with suppress(KeyboardInterrupt):
            _follow(run, stage, ends, printer)


def log_files(run: Run, stage: str | None) -> list[Path]:
    """The logs of a stage's newest jobs that are not empty: those of failed tasks first, then the
    newest. Without a stage: the run's log."""
    sizes = {path: stat for path in _places(run, stage) if (stat := _stat(path)) is not None}
    written = [path for path, stat in sizes.items() if stat.st_size]
    return sorted(written, key=lambda path: (not _tells_of_failure(path), -sizes[path].st_mtime))


def _places(run: Run, stage: str | None) -> list[Path]:
    if stage is None:
        return [run.log]
    places = [run.logs / f"{stage}.launch.log"]
    for submission in _newest(Ledger(run).all(), stage):
        folder = run.job_folder(submission.key, submission.number)
        if folder.is_dir():
            places += [path for path in folder.iterdir() if path.suffix in _LOG_SUFFIXES]
    return places


def last_lines(path: Path, count: int, end: int | None = None) -> list[str]:
    """The last lines of a file up to a byte, by default all of it, read backwards."""
    with path.open("rb") as handle:
        position, data = handle.seek(0, os.SEEK_END) if end is None else end, b""
        while position > 0 and data.count(b"\n") <= count and len(data) < _MOST_BYTES:
            step = min(_BLOCK, position)
            position -= step
            handle.seek(position)
            data = handle.read(step) + data
    lines = data.decode("utf-8", "replace").split("\n")
    if lines and not lines[-1]:
        lines.pop()
    return lines[-count:] if count else []


def harmless(line: str) -> str:
    """A line of a log without anything that a terminal would obey.

    Of a progress bar that draws over itself the last state stays.
    """
    line = _SEQUENCE.sub("", line).rstrip("\r").rpartition("\r")[2]
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", line)


def _check(stage: str | None) -> None:
    names = [known.name for known in STAGES]
    if stage is not None and stage not in names:
        raise ConfigError(f"There is no stage {stage!r}", fix=f"Stages: {', '.join(names)}")


def _newest(submissions: Iterable[Submission], stage: str) -> list[Submission]:
    """The last submission of each of the stage's keys."""
    return list({s.key: s for s in submissions if stage in s.stages}.values())


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


_FAILURE = re.compile(rb"Traceback \(most recent|(?:^|\n)error: |slurmstepd: error|Job has failed")


def _tells_of_failure(path: Path) -> bool:
    with path.open("rb") as handle:
        handle.seek(max(0, handle.seek(0, os.SEEK_END) - _BLOCK))
        return _FAILURE.search(handle.read()) is not None


def label(path: Path) -> str:
    """What stands before a log's lines where several are shown: job and task."""
    match = _SUBMITIT.match(path.stem) or _PLAIN.match(path.stem)
    if match is None:
        return path.name.removesuffix(".log")
    task = f"_{match['task']}" if match["task"] else ""
    return f"{match['job']}{task}{' err' if path.suffix == '.err' else ''}"


class _Printer:
    """Writes lines with their origin."""

    def __init__(self, console: Console, run: Run) -> None:
        self._console, self._root = console, run.root

    def show(self, path: Path, lines: Sequence[str], *, many: bool) -> None:
        """The lines of one log."""
        prefix = f"{label(path)} │ " if many else ""
        for line in lines:
            self._console.rich.print(
                Text.assemble((prefix, "cyan"), harmless(line)), soft_wrap=True
            )


@dataclass(slots=True)
class _Tail:
    """A file that is being followed."""

    path: Path
    position: int = 0
    inode: int = 0
    rest: bytes = field(default=b"")
    """The beginning of a line that has no end yet."""

    def read(self) -> list[str]:
        """The lines that were finished since the last time."""
        stat = _stat(self.path)
        if stat is None:
            return []
        if stat.st_size < self.position or (self.inode and stat.st_ino != self.inode):
            # A requeued job truncates its log, unless it is told to append.
            self.position, self.rest = 0, b""
        self.inode = stat.st_ino
        if stat.st_size == self.position:
            return []
        with self.path.open("rb") as handle:
            handle.seek(self.position)
            data = handle.read(_MOST_BYTES)
        self.position += len(data)
        *whole, self.rest = (self.rest + data).split(b"\n")
        return [line.decode("utf-8", "replace") for line in whole]


def _follow(run: Run, stage: str | None, ends: Mapping[Path, int], printer: _Printer) -> None:
    tails = {path: _Tail(path, position) for path, position in ends.items()}
    looked = time.monotonic()
    while True:
        for path, tail in tails.items():
            if lines := tail.read():
                printer.show(path, lines, many=len(tails) > 1)
        time.sleep(_POLL_S)
        if time.monotonic() - looked > _FILES_EVERY_S:
            looked = time.monotonic()
            new = [path for path in _places(run, stage) if path not in tails]
            tails |= {path: _Tail(path) for path in new}
