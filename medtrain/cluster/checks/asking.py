"""Other programs, asked with a time limit: commands of the system, and our own tasks.

ask(command) → its exit code and what it said; a missing command or a late one is an answer too
start(module, …) → a child Python that prints one JSON object → `result()` → that object, or why not
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import IO, Any, NamedTuple

NOT_FOUND, TOO_LATE = 127, 124


class Answer(NamedTuple):
    """What a command said."""

    code: int
    out: str
    err: str

    @property
    def ok(self) -> bool:
        """Whether it succeeded."""
        return self.code == 0

    @property
    def complaint(self) -> str:
        """Its last line on standard error, or on standard output where there is none."""
        lines = (self.err.strip() or self.out.strip()).splitlines()
        return lines[-1].strip() if lines else f"exit code {self.code}"


def ask(
    *command: str,
    timeout_s: float = 15.0,
    stdin: str = "",
    environment: Mapping[str, str] | None = None,
) -> Answer:
    """Run a command to its end, or to the time limit."""
    try:
        done = subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",
            env=environment,
            timeout=timeout_s,
            check=False,
        )
    except (FileNotFoundError, PermissionError) as error:
        return Answer(NOT_FOUND, "", f"{command[0]}: {error.strerror}")
    except subprocess.TimeoutExpired:
        return Answer(TOO_LATE, "", f"{command[0]} did not answer within {timeout_s:g} s")
    return Answer(done.returncode, done.stdout, done.stderr)


class ChildResult(NamedTuple):
    """What a child said: `value` is empty where there is a `problem`."""

    value: dict[str, Any]
    problem: str


class Child:
    """A Python process that runs one module; `start` makes it."""

    def __init__(self, process: subprocess.Popen[bytes], out: IO[bytes], err: IO[bytes]) -> None:
        self._process, self._out, self._err = process, out, err

    def result(self, timeout_s: float) -> ChildResult:
        """The JSON object that the child printed last, or why there is none."""
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.end()
            return ChildResult({}, f"no answer within {timeout_s:g} s")
        if code < 0:
            return ChildResult({}, f"ended by {_signal_name(-code)}")
        for line in reversed(_lines(self._out)):
            if line.startswith("{"):
                return ChildResult(json.loads(line), "")
        said = [line for line in _lines(self._err) if line.strip()]
        return ChildResult({}, said[-1] if said else f"ended with exit code {code}")

    def end(self) -> None:
        """Kill what is left of it and of its own children."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@contextmanager
def start(module: str, *arguments: str, **environment: str) -> Iterator[Child]:
    """A module of medtrain in a process of its own, which ends with the block."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        child = Child(process, out, err)
        try:
            yield child
        finally:
            child.end()


def _lines(handle: IO[bytes]) -> list[str]:
    handle.seek(0)
    return handle.read().decode("utf-8", "replace").splitlines()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
