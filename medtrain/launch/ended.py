"""Why a launch ended badly where no process could say: a signal, as the launcher below noted it."""

from __future__ import annotations

import re
import signal
from pathlib import Path

from medtrain.errors import MedtrainError

# torchrun's summary, of the process that failed first.
_FIRST = re.compile(r"Root Cause.*?\brank\s*: (\d+).*?\bexitcode\s*: -(\d+)\b", re.DOTALL)
_SUMMARY_BYTES = 16_384


def error_of(stage: str, code: int, log: Path, again: str) -> MedtrainError:
    """The error of processes that left none.

    Args:
        stage: for the message.
        code: the launcher's exit code; negative: the signal that ended it.
        log: what it and the processes wrote to stderr.
        again: what to do in any case.
    """
    process, number = (0, -code) if code < 0 else _first_signal(log)
    where = f"What they said is in {log}. {again}"
    if not number:
        return MedtrainError(f"The {stage} processes ended with exit code {code}", fix=where)
    if number == signal.SIGKILL:
        where = (
            "Where nobody killed it, the node's memory ran out: ask for more (cluster.mem_gb), or "
            f"train in fewer processes. {where}"
        )
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    return MedtrainError(f"Process {process} of {stage} was ended by {name}", fix=where)


def _first_signal(log: Path) -> tuple[int, int]:
    """The process that failed first and the signal that ended it; 0 where it was none."""
    with log.open("rb") as said:
        said.seek(max(0, log.stat().st_size - _SUMMARY_BYTES))
        found = _FIRST.search(said.read().decode(errors="replace"))
    return (int(found[1]), int(found[2])) if found else (0, 0)
