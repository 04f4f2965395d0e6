"""The command that starts a node's processes, and their environment.

one process on a GPU      python -m medtrain STAGE CONFIG, in a process that gives its memory back
several, DDP on a CPU     torchrun
everything else           accelerate launch with the strategy's file
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from medtrain.config import RunConfig
from medtrain.environment import LAUNCHER_VARIABLE, STRATEGY_VARIABLE
from medtrain.launch.devices import cpu_cores
from medtrain.launch.meeting import Meeting
from medtrain.launch.place import NodePlace
from medtrain.launch.strategy import DEEPSPEED, config_file

# Of an outer launcher or MPI: accelerate, torch and DeepSpeed would take its ranks, addresses and
# sizes for ours, and libraries that find PMI look for an MPI job. Slurm's bindings of this task:
# srun has made them already, and a child that makes them again shares its first cores with all
# others. What users set for themselves (NCCL_*, GLOO_*, PET_*, OMP_*) stays.
_DROPPED = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE",
            "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE",
            "DS_ACCELERATOR")  # fmt: skip
_DROPPED_PREFIXES = ("SLURM_CPU_BIND", "SLURM_MEM_BIND", "PMI_", "PMI2_", "PMIX_", "OMPI_", "MPI_",
                     "MV2_", "TORCHELASTIC_", "ACCELERATE_", "FSDP_")  # fmt: skip


class Node(NamedTuple):
    """What is started on this node."""

    place: NodePlace
    processes: int
    """On each node."""
    gpus: int
    """In sight of this one; 0 on a CPU."""

    @property
    def total(self) -> int:
        """Processes of all nodes."""
        return self.place.nodes * self.processes


def command(config: RunConfig, program: Sequence[str], node: Node, meeting: Meeting) -> list[str]:
    """The command that starts this node's processes.

    Args:
        config: the run's.
        program: what each process is to run, in arguments of python: a script, or `-m` and a name.
        node: what is started here.
        meeting: what the nodes have agreed on.
    """
    if meeting.strategy == "ddp" and not (node.gpus and config.train.accelerate_config):
        if node.total == 1:
            return [sys.executable, *program]
        if node.gpus == 0:
            return [*_torchrun(node, meeting), *program]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch"]
    file = config_file(config, meeting.strategy)
    return [*accelerate, f"--config_file={file}", *_accelerate(node, meeting), *program]


def _torchrun(node: Node, meeting: Meeting) -> list[str]:
    place = node.place
    start = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={node.processes}"]
    if place.nodes == 1:
        return start
    return [*start, f"--nnodes={place.nodes}", f"--node_rank={place.rank}",
            f"--master_addr={meeting.head}", f"--master_port={meeting.port}"]  # fmt: skip


def _accelerate(node: Node, meeting: Meeting) -> list[str]:
    # Accelerate takes a rendezvous backend and same_network from no file.
    place = node.place
    numbers = [f"--num_machines={place.nodes}", f"--machine_rank={place.rank}",
               f"--num_processes={node.total}", "--dynamo_backend=no"]  # fmt: skip
    if place.nodes == 1:
        return numbers
    return [*numbers, f"--main_process_ip={meeting.head}", f"--main_process_port={meeting.port}",
            "--rdzv_backend=static", "--same_network"]  # fmt: skip


def environment(node: Node, meeting: Meeting) -> dict[str, str]:
    """This process's environment without what would mislead the processes, with what they need."""
    kept = {name: value for name, value in os.environ.items() if not _is_dropped(name)}
    made = {STRATEGY_VARIABLE: meeting.strategy, LAUNCHER_VARIABLE: str(os.getpid())}
    if node.processes > 1 and "OMP_NUM_THREADS" not in kept:
        made["OMP_NUM_THREADS"] = str(max(1, cpu_cores() // node.processes))
    made |= _rendezvous(node.place)
    if meeting.strategy in DEEPSPEED and node.gpus == 0:
        made |= {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}
    elif meeting.strategy in DEEPSPEED:
        # It compiles with ninja, which lies beside python where no environment is active.
        python = str(Path(sys.executable).parent)
        made["PATH"] = os.pathsep.join(filter(None, [python, kept.get("PATH")]))
    return {**kept, **made}


def _rendezvous(place: NodePlace) -> dict[str, str]:
    """What torchrun, which is also inside accelerate, takes from variables only."""
    # Not SIGTERM: a save takes longer than torchrun would wait after it (processes.py).
    signals = {"PET_SIGNALS_TO_HANDLE": "SIGINT,SIGHUP,SIGQUIT"}
    if place.nodes == 1:
        # Any free port, taken in the moment it is found; and a host's own name may not resolve.
        return {**signals, "PET_STANDALONE": "1", "PET_LOCAL_ADDR": "127.0.0.1"}
    return {**signals, "PET_RDZV_ID": place.meeting}


def _is_dropped(name: str) -> bool:
    return name in _DROPPED or name.startswith(_DROPPED_PREFIXES)
