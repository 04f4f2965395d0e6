"""The devices that a node's processes can have.

Counting asks the driver from this process, which makes no context on a GPU. Memory is asked for
from a process of its own, because that makes one, and this process outlives the training.
"""

from __future__ import annotations

import os
import subprocess
import sys

from medtrain.errors import BadNodeError

_TIMEOUT_S = 300.0
_SMALLEST_GPU = (
    "import torch; print(min(torch.cuda.get_device_properties(i).total_memory"
    " for i in range(torch.cuda.device_count())))"
)


def gpu_count() -> int:
    """GPUs that this process sees."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def gpu_bytes() -> int:
    """Memory of the smallest GPU that this process sees, in bytes.

    Raises:
        BadNodeError: the driver does not answer.
    """
    command = [sys.executable, "-c", _SMALLEST_GPU]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=_TIMEOUT_S
        )
    except subprocess.SubprocessError as error:
        said = getattr(error, "stderr", None) or str(error)
        raise BadNodeError(
            f"The GPU's memory cannot be read: {said.strip().splitlines()[-1]}",
            fix="Look at nvidia-smi, or set train.strategy.",
        ) from error
    return int(done.stdout)


def cpu_cores() -> int:
    """CPU cores that this process may use: Slurm's share of the task, or what it is bound to."""
    bound = len(os.sched_getaffinity(0))
    return min(bound, int(os.environ.get("SLURM_CPUS_PER_TASK") or bound))
