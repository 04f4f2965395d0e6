"""What a part of bench/gpu.py has found: a JSON file that is written anew after every figure.

A part that is stopped, or fails, leaves behind what it had.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

Found = TypeVar("Found")


class Record:
    """The figures of one part."""

    def __init__(self, path: Path, seconds: float, *, tiny: bool) -> None:
        """Begin.

        Args:
            path: of the file.
            seconds: until the part is stopped.
            tiny: sizes at which nothing is measured, for a CPU.
        """
        self._path, self._until, self.tiny = path, time.monotonic() + seconds, tiny
        self.found: dict[str, Any] = {"figures": {}, "left_out": [], "failed": {}, "details": {}}
        self._write()

    @property
    def seconds_left(self) -> float:
        """Until the part is stopped."""
        return self._until - time.monotonic()

    def figure(self, name: str, said: str, **details: Any) -> None:
        """Note a figure: what the table at the end says, and the numbers behind it."""
        self.found["figures"][name] = said
        self.found["details"][name] = details
        print(f"  {name}: {said}", flush=True)
        self._write()

    def attempt(self, name: str, work: Callable[[], Found], *, seconds: float) -> Found | None:
        """Do one thing of several; it may fail without the others.

        Args:
            name: for the file.
            work: what to do.
            seconds: that it takes at least; it is left out where less is left.
        """
        if self.seconds_left < (0 if self.tiny else seconds):
            self.found["left_out"].append(name)
            self._write()
            return None
        try:
            return work()
        except Exception as error:
            traceback.print_exc()
            self.found["failed"][name] = f"{type(error).__name__}: {error}"[:500]
            self._write()
            return None

    def _write(self) -> None:
        beside = self._path.with_suffix(".tmp")
        beside.write_text(json.dumps(self.found, indent=1, default=str), encoding="utf-8")
        beside.replace(self._path)


def milliseconds(work: Callable[[], Any], repeats: int = 10, warm: int = 3) -> float:
    """The median time of some work, the GPU waited for."""
    from statistics import median

    times = []
    for turn in range(warm + repeats):
        settle()
        began = time.perf_counter()
        work()
        settle()
        if turn >= warm:
            times.append((time.perf_counter() - began) * 1e3)
    return median(times)


def settle() -> None:
    """Wait for the GPU, where there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
