"""Locks of a run directory: the kernel's, so that a process that was killed holds nothing.

computing   one `medtrain run`, or one short job, at a time; a training that it launched holds a
            lock of its own, under the parent's, and outlives it
waiting     anything else that only one process may do at a time
Where the file system has no locks, nothing is held: publications still have one winner.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from medtrain.errors import TryAgainError

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""What flock says on a file system that has no locks."""
_HELD = "MEDTRAIN_LOCK_HELD"
"""Names the run directory whose lock a parent process holds for this one."""
_PAUSE_S = 0.2


@contextmanager
def computing(root: Path, lock: Path, launched: Path, *, wait_s: float) -> Iterator[None]:
    """Hold a run directory, or, in a child of the process that does, the lock of what it launched.

    Raises:
        TryAgainError: another process holds it, and has held it for `wait_s` seconds.
    """

    @contextmanager
    def both() -> Iterator[None]:
        if os.environ.get(_HELD) == str(root.resolve()):
            with _hold(launched):
                yield
            return
        with _hold(lock):
            # A launched training outlives a parent that was killed; it must have ended too.
            with _hold(launched):
                pass
            yield

    with ExitStack() as held:
        _enter(held, both, wait_s)
        yield


@contextmanager
def waiting(lock: Path, wait_s: float) -> Iterator[None]:
    """Hold one lock.

    Raises:
        TryAgainError: another process has held it for `wait_s` seconds.
    """
    with ExitStack() as held:
        _enter(held, lambda: _hold(lock), wait_s)
        yield


def environment(root: Path) -> dict[str, str]:
    """For a child process that works under this process's lock of a run directory."""
    return {_HELD: str(root.resolve())}


def _enter(
    held: ExitStack, hold: Callable[[], AbstractContextManager[None]], wait_s: float
) -> None:
    deadline = time.monotonic() + wait_s
    while True:
        try:
            held.enter_context(hold())
            return
        except TryAgainError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_PAUSE_S)


@contextmanager
def _hold(lock: Path) -> Iterator[None]:
    with lock.open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                yield
                return
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            handle.seek(0)
            raise TryAgainError(
                f"Another medtrain works in {lock.parent} ({handle.read().strip()})",
                fix="Wait until it is done, or stop it; what it finished is kept.",
            ) from None
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        handle.flush()
        yield
