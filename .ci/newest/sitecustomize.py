"""Notes what is deprecated, in every Python process of `.ci/run --newest`.

warnings.warn and logging's warnings, which medtrain keeps off the screen → who called what warned,
past the library that warns and past PyTorch's way of calling a module → one line in the file that
MEDTRAIN_DEPRECATED names: `ours` where medtrain calls, `theirs` where a library calls another one.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_FILE = os.environ.get("MEDTRAIN_DEPRECATED")
_PACKAGE = str(Path(__file__).parents[2] / "medtrain") + os.sep
_PASSED_ON = {"torch", "contextlib", "functools", "warnings", "logging", "typing_extensions"}
"""Modules that call what others hand them."""
_seen: set[str] = set()


def _note(said: str, depth: int) -> None:
    frames = list(_frames(sys._getframe(depth)))
    warns = _top(frames[0])
    callers = [f for f in frames if _top(f) not in {warns, *_PASSED_ON} or _is_ours(f)]
    through = next((_place(frame) for frame in frames if _is_ours(frame)), "no line of medtrain")
    ours = bool(callers) and _is_ours(callers[0])
    caller = f"{_top(callers[0])} through " if callers and not ours else ""
    whose = "ours" if ours else "theirs"
    line = f"{whose} {caller}{through}: {' '.join(said.split())[:240]}"
    if line not in _seen:
        _seen.add(line)
        with Path(str(_FILE)).open("a", encoding="utf-8") as noted:
            noted.write(line + "\n")


def _frames(frame: Any) -> Iterator[Any]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_ours(frame: Any) -> bool:
    return bool(frame.f_code.co_filename.startswith(_PACKAGE))


def _place(frame: Any) -> str:
    return f"medtrain/{frame.f_code.co_filename.removeprefix(_PACKAGE)}:{frame.f_lineno}"


def _top(frame: Any) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _watch() -> None:
    warn, log = warnings.warn, logging.Logger.warning

    @functools.wraps(warn)
    def noted_warn(
        message: Any, category: Any = None, stacklevel: int = 1, *args: Any, **more: Any
    ) -> None:
        kind = type(message) if isinstance(message, Warning) else category
        if isinstance(kind, type) and issubclass(kind, (DeprecationWarning, FutureWarning)):
            _note(f"{kind.__name__}: {message}", 2)
        warn(message, category, stacklevel + 1, *args, **more)

    @functools.wraps(log)
    def noted_log(logger: Any, message: Any, *args: Any, **more: Any) -> None:
        if "deprecat" in str(message).lower():
            _note(f"{logger.name}: {message}", 2)
        log(logger, message, *args, **more)

    warnings.warn = noted_warn
    logging.Logger.warning = noted_log  # type: ignore[method-assign]


if _FILE:
    _watch()
