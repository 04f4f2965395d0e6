"""The environment variables by which a launcher and the training processes know of each other."""

from __future__ import annotations

STRATEGY_VARIABLE = "MEDTRAIN_STRATEGY"
"""How weights, gradients and state lie on the devices (medtrain.config.training.Strategy); not
set: one process, or DDP."""
STOP_FILE_VARIABLE = "MEDTRAIN_STOP_FILE"
"""Names a file on the node's own disk; once it exists, the node's processes are to save and end."""
