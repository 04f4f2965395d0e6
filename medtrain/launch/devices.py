"""The devices that a node's processes can have.

Counting asks the driver from this process, which makes no context on a GPU. Memory is asked for
from a process of its own, because that makes one, and this process outlives the training.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import NamedTuple

from medtrain.errors import BadNodeError

_TIMEOUT_S = 300.0
_LOOK = (
    "import torch; print(min(torch.cuda.get_device_properties(i).total_memory"
    " for i in range(torch.cuda.device_count())),"
    " int(torch.cuda.is_bf16_supported(including_emulation=False)))"
)


class Gpu(NamedTuple):
    """What the GPUs that this process sees have in common."""

    bytes: int
    """Memory of the smallest."""
    has_bfloat16: bool


def gpu_count() -> int:
    """GPUs that this process sees."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def look_at_gpus() -> Gpu:
    """Memory and abilities of the GPUs in sight, of which there must be one.

    Raises:
        BadNodeError: the driver does not answer.
    """
    command = [sys.executable, "-c", _LOOK]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=_TIMEOUT_S
        )
    except subprocess.SubprocessError as error:
        said = str(getattr(error, "stderr", None) or error).strip()
        raise BadNodeError(
            f"The GPU's memory cannot be read: {said.splitlines()[-1]}",
            fix="Look at nvidia-smi, or set train.strategy.",
        ) from error
    size, bfloat16 = done.stdout.split()
    return Gpu(int(size), bfloat16 == "1")


def cpu_cores() -> int:
    """CPU cores that this process may use: Slurm's share of the task, or what it is bound to."""
    bound = len(os.sched_getaffinity(0))
    return min(bound, int(os.environ.get("SLURM_CPUS_PER_TASK") or bound))
