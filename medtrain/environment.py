"""The environment variables by which a launcher and the training processes know of each other."""

from __future__ import annotations

import os

STRATEGY_VARIABLE = "MEDTRAIN_STRATEGY"
"""How weights, gradients and state lie on the devices (medtrain.config.training.Strategy); not
set: one process, or DDP."""
STOP_FILE_VARIABLE = "MEDTRAIN_STOP_FILE"
"""Names a file on the node's own disk; once it exists, the node's processes are to save and end."""
LAUNCHER_VARIABLE = "MEDTRAIN_LAUNCHER_PID"
"""Names the process of medtrain's launcher."""

# Of one process, accelerate sets no rank.
_LAUNCHED = ("LOCAL_RANK", "RANK", "ACCELERATE_MIXED_PRECISION", LAUNCHER_VARIABLE)


def is_launched() -> bool:
    """Whether a launcher (ours, accelerate, torchrun, deepspeed) started this process."""
    return any(variable in os.environ for variable in _LAUNCHED)
