"""Why a launch ended badly where no process could say: a signal, as the launcher below noted it."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import NamedTuple

from medtrain.errors import MedtrainError

# torchrun's summary, of the process that failed first.
_FIRST = re.compile(r"Root Cause.*?\brank\s*: (\d+).*?\bexitcode\s*: -(\d+)\b", re.DOTALL)
_SUMMARY_BYTES = 16_384


class Killed(NamedTuple):
    """A death that leaves no word."""

    who: str
    signal: int


def killed_by(code: int, log: Path) -> Killed | None:
    """The first of a launch's processes that a signal ended; None where none was.

    Args:
        code: the launcher's exit code; negative: the signal that ended it.
        log: what it and the processes wrote to stderr.
    """
    if code < 0:
        return Killed("The only process or the launcher", -code)
    with log.open("rb") as said:
        said.seek(max(0, log.stat().st_size - _SUMMARY_BYTES))
        found = _FIRST.search(said.read().decode(errors="replace"))
    return Killed(f"Process {found[1]}", int(found[2])) if found else None


def error_of(stage: str, code: int, killed: Killed | None, log: Path, again: str) -> MedtrainError:
    """The error of processes that left none; `again` is what to do in any case."""
    where = f"What they said is in {log}. {again}"
    if killed is None:
        return MedtrainError(f"The {stage} processes ended with exit code {code}", fix=where)
    number = killed.signal
    if number == signal.SIGKILL:
        where = (
            "Where nobody killed it, the node's memory ran out: ask for more (cluster.mem_gb), or "
            f"train in fewer processes. {where}"
        )
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    return MedtrainError(f"{killed.who} of {stage} was ended by {name}", fix=where)
