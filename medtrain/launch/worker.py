"""The other end of a launch: what a training process does before anything else.

It ends with whoever started it, however that ends, and knows its strategy also where a person
started it with `accelerate launch`.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

from medtrain.environment import (
    LAUNCHER_VARIABLE,
    STOP_FILE_VARIABLE,
    STRATEGY_VARIABLE,
    is_launched,
)
from medtrain.errors import MedtrainError
from medtrain.launch.strategy_files import strategy_named

IN_JOB_VARIABLE = "MEDTRAIN_IN_JOB"
"""Set where a job of the run has started this process, so that the run's jobs are no strangers."""
_PR_SET_PDEATHSIG = 1
_STOP_FILE_WITHIN_S = 2.0


def begin() -> None:
    """Settle what a launched process depends on.

    Raises:
        MedtrainError: the launcher has ended already.
    """
    strategy = strategy_of_accelerate()
    if strategy is not None:
        os.environ.setdefault(STRATEGY_VARIABLE, strategy)
    launcher = os.environ.get(LAUNCHER_VARIABLE)
    if is_launched():
        end_with_parent(signal.SIGKILL)
    if launcher is not None:
        parent = os.getppid()
        # torchrun may stand between. Whoever ended before the line above sent no signal.
        if int(launcher) not in (parent, _parent_of(parent)):
            raise MedtrainError("The launcher of this process has ended")
        signal.signal(signal.SIGTERM, _end_unless_asked_to_save)


def _end_unless_asked_to_save(number: int, frame: FrameType | None) -> None:
    """End at once where another process of this launch has failed, which torchrun says by SIGTERM.

    Slurm's SIGTERM to all processes is the launcher's to act on: it makes the stop file.
    """
    stop_file = Path(os.environ[STOP_FILE_VARIABLE])
    deadline = time.monotonic() + _STOP_FILE_WITHIN_S
    while not stop_file.exists():
        if time.monotonic() > deadline:
            os._exit(128 + number)
        time.sleep(0.05)


def end_with_parent(number: signal.Signals) -> None:
    """Have the kernel send this process a signal when the thread that started it ends.

    A launcher that is killed cannot end its processes, which would hold their GPUs and wait for
    each other; torchrun starts them in sessions of their own, so that no terminal ends them either.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)


def _parent_of(process: int) -> int | None:
    with suppress(OSError):
        # `pid (name) state ppid …`: a name may hold blanks and brackets.
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
        return int(stat.rpartition(")")[2].split()[1])
    return None


def strategy_of_accelerate() -> str | None:
    """The strategy that accelerate's launcher was told, from its variables; None without one.

    Raises:
        ConfigError: it is one that medtrain does not know.
    """
    environment = os.environ
    if environment.get("ACCELERATE_USE_FSDP") == "true":
        return strategy_named("FSDP", {"fsdp_version": environment.get("FSDP_VERSION", "1")})
    if environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
        names = ("ZERO_STAGE", "OFFLOAD_PARAM_DEVICE", "CONFIG_FILE")
        given = {name: environment.get(f"ACCELERATE_DEEPSPEED_{name}") for name in names}
        fields = {
            "zero_stage": given["ZERO_STAGE"],
            "offload_param_device": given["OFFLOAD_PARAM_DEVICE"],
            "deepspeed_config_file": given["CONFIG_FILE"],
        }
        return strategy_named("DEEPSPEED", fields)
    return None
