"""Who starts a training stage: this process, or a launcher that starts one process a device.

place of this node (place.py) + devices in sight (devices.py) + the strategy that fits them, or a
refusal (strategy.py) → what all nodes agree on before they start (meeting.py) → a command and its
environment (command.py) → run to its end, which may be a save and exit 75 because somebody asked
for it (processes.py); stage.py joins them. The processes at the other end begin in worker.py.

Launchers turn every exit code into 1: processes leave their error in stages/<stage>.failure.json.
"""

from medtrain.launch.stage import check_launch, launch
from medtrain.launch.worker import IN_JOB_VARIABLE

__all__ = ["IN_JOB_VARIABLE", "check_launch", "launch"]
