"""How a training process ends: with its exit code, and without taking Python apart."""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import sys
from contextlib import suppress

from medtrain.errors import MedtrainError


class Ending:
    """The last thing that a training process does: it leaves with its exit code.

    gloo's threads give back the tensors of the last collective a moment after it. One that needs
    Python's lock for that while the interpreter is being taken apart aborts the process, and with
    it a training that has been done and saved. So nothing is taken apart: registered before anyone
    else's, this comes after all other exit handlers, and after the threads that Python waits for.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self.code = MedtrainError.exit_code
        """Of an end that nobody foresaw."""

    @classmethod
    def register(cls) -> Ending:
        """Be the last exit handler; only where nobody has registered one that matters."""
        ending = cls()
        atexit.register(ending._leave)
        return ending

    def _leave(self) -> None:
        if os.getpid() != self._process:
            return  # a child that was forked ends in its own way
        logging.shutdown()  # imported, and so registered, before
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # closed, or nobody reads it
                stream.flush()
        ctypes.CDLL(None).fflush(None)  # what libraries have printed
        os._exit(self.code)
