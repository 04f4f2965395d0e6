"""Being told to stop, and all processes knowing it at the same moment.

SIGTERM, SIGUSR1 or SIGUSR2 to a process, or a file that its launcher makes → a flag → at the end of
a step, or between two forward passes of an evaluation, the processes ask each other → all of them
stop there, or none. A flag of one process alone would leave the others waiting in a collective.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from medtrain.environment import STOP_FILE_VARIABLE

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Whether somebody wants this training to stop."""

    def __init__(self, stop_file: Path | None = None) -> None:
        """Nothing is asked for yet.

        Args:
            stop_file: means "stop" once it exists; None takes the one that the launcher named.
        """
        named = os.environ.get(STOP_FILE_VARIABLE)
        self._file = stop_file or (Path(named) if named else None)
        self._asked = False

    def ask(self) -> None:
        """Ask for it from within this process."""
        self._asked = True

    @property
    def here(self) -> bool:
        """Whether this process, or its node, was told to stop."""
        if not self._asked and self._file is not None:
            self._asked = self._file.exists()
        return self._asked

    def agreed(self, device: torch.device) -> bool:
        """Whether any process was told to stop: the same answer in all of them.

        A collective operation: all processes must ask at the same point.
        """
        return any_process(self.here, device)

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Turn the signals into the flag while training goes on; a second one acts as it did."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        # None: a handler that is not Python's, and that Python cannot bring back.
        before = {number: signal.getsignal(number) or signal.SIG_DFL for number in SIGNALS}

        def told(number: int, frame: FrameType | None) -> None:
            self._asked = True
            signal.signal(number, before[signal.Signals(number)])

        for number in SIGNALS:
            signal.signal(number, told)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process; the same answer in all of them."""
    return bool(greatest(int(flag), device))


def greatest(number: int, device: torch.device) -> int:
    """The greatest of all processes' numbers; the same answer in all of them."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return number
    shared = torch.tensor(number, device=device)
    torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
    return int(shared.item())
