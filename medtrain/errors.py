"""The one tree of errors; every class carries the exit code of the process it ends.

MedtrainError                70  anything that went wrong inside medtrain
├── ConfigError              64  the configuration or the command line is wrong
├── DataError                65  input is missing, malformed, or does not match its hash
│   └── AdapterMismatchError 65  an adapter does not fit the base it is loaded on
├── EndpointError            69  a model endpoint or hub cannot be reached, or refuses
├── TryAgainError            75  nothing is wrong that time or space will not mend
│   └── StoppedError         75  somebody asked for this end
└── BadNodeError             78  this machine cannot do the work (no GPU, broken driver)

The numbers follow BSD's sysexits.h where it has a name for the case. A message says what is wrong,
`fix` says what to do; both are shown to the user without a traceback.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Any, ClassVar

DEBUG_VARIABLE = "MEDTRAIN_DEBUG"
"""Set in the environment by --debug, so that child processes know it too."""


class MedtrainError(Exception):
    """What a user sees: one message, one fix, one exit code."""

    exit_code: ClassVar[int] = 70

    def __init__(self, message: str, *, fix: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message}\n{self.fix}" if self.fix else self.message


class ConfigError(MedtrainError):
    """The configuration or the command line is wrong."""

    exit_code = 64


class DataError(MedtrainError):
    """Input is missing, malformed or does not match its hash."""

    exit_code = 65


class AdapterMismatchError(DataError):
    """An adapter does not fit the base model it is loaded on."""


class EndpointError(MedtrainError):
    """A model endpoint or hub cannot be reached, or refuses."""

    exit_code = 69


class TryAgainError(MedtrainError):
    """A full disk, a busy run directory: the same command may work later."""

    exit_code = 75


class StoppedError(TryAgainError):
    """Somebody asked for this end: a person, or Slurm. Nothing has failed."""


class BadNodeError(MedtrainError):
    """This machine cannot do the work."""

    exit_code = 78


def as_medtrain_error(error: Exception) -> MedtrainError:
    """Any error in the words of this tree: what a user can mend is not called a fault of ours."""
    if isinstance(error, MedtrainError):
        return error
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" ({error.filename})" if error.filename else ""
            return TryAgainError(
                f"The disk is full{where}",
                fix="Free some space and run the same command: what is finished is kept.",
            )
        if error.filename and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return ConfigError(
                f"{error.filename} may not be read or written: {error.strerror}",
                fix="Look at its owner and permissions, or choose another output_dir.",
            )
    text = str(error).strip() or "no message"
    return MedtrainError(
        f"{type(error).__name__}: {text}",
        fix="This is a fault in medtrain or in a library. Run again with --debug for the "
        "traceback; what is finished is kept.",
    )


def from_exit_code(exit_code: int, message: str, fix: str = "") -> MedtrainError:
    """The error a child process ended with, rebuilt in its parent."""
    for kind in (ConfigError, DataError, EndpointError, TryAgainError, BadNodeError):
        if kind.exit_code == exit_code:
            return kind(message, fix=fix)
    return MedtrainError(message, fix=fix)


def from_record(failure: Mapping[str, Any]) -> MedtrainError:
    """The error that another process left in a file (medtrain.lineage), as it was raised there."""
    if failure.get("stopped"):
        return StoppedError(failure["message"], fix=failure["fix"])
    return from_exit_code(failure["exit_code"], failure["message"], failure["fix"])
