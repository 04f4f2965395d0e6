"""Which of how many nodes this is, where srun has started one task on each."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass

from medtrain.errors import BadNodeError


@dataclass(frozen=True, slots=True)
class NodePlace:
    """One node among those of a job step; the default is a machine of its own."""

    nodes: int = 1
    rank: int = 0
    name: str = ""
    """By which the other nodes reach this one."""
    job: int = 0
    restarts: int = 0
    """How often the job was queued again."""
    step: str = "0"

    @classmethod
    def from_environment(cls) -> NodePlace:
        """From what Slurm tells a task of a job step; one node where there is no such step.

        Raises:
            BadNodeError: Slurm does not say which nodes there are.
        """
        nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))
        if nodes == 1 or os.environ.get("SLURM_STEP_NUM_TASKS") != str(nodes):
            return cls()
        rank = int(os.environ["SLURM_NODEID"])
        return cls(
            nodes=nodes,
            rank=rank,
            name=os.environ.get("SLURMD_NODENAME") or _node_names()[rank],
            job=int(os.environ["SLURM_JOB_ID"]),
            restarts=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            step=os.environ.get("SLURM_STEP_ID", "0"),
        )

    @property
    def meeting(self) -> str:
        """What only the tasks of one try of one step have in common."""
        return f"{self.job}.{self.restarts}.{self.step}"


def _node_names() -> list[str]:
    names = os.environ["SLURM_STEP_NODELIST"]
    command = ["scontrol", "show", "hostnames", names]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise BadNodeError(f"The names of the nodes {names} cannot be read: {error}") from error
    return done.stdout.split()
