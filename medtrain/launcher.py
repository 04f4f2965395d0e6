"""Who starts a training stage: this process on a CPU, `accelerate launch` where there are GPUs.

GPUs in sight → accelerate launch -m medtrain sft <run>/config.yaml → the child keeps the books and,
should it fail, leaves its error in stages/<stage>.failure.json, because launchers turn every exit
code into 1. What the launcher itself has to say goes to logs/<stage>.launch.log.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from medtrain.config import RunConfig
from medtrain.console import Console
from medtrain.errors import (
    DEBUG_VARIABLE,
    BadNodeError,
    ConfigError,
    MedtrainError,
    from_exit_code,
)
from medtrain.lineage import Lineage
from medtrain.run import Run

# Of one process, accelerate sets no rank.
_LAUNCHED = ("LOCAL_RANK", "RANK", "ACCELERATE_MIXED_PRECISION")
IN_JOB_VARIABLE = "MEDTRAIN_IN_JOB"
"""Set where a job of the run has started this process, so that the run's jobs are no strangers."""
_STOP_WAIT_S = 30.0
_FIRST_PORT, _PORTS = 20_000, 10_000


@dataclass(frozen=True, slots=True)
class NodePlace:
    """Which of how many nodes this is, where srun has started one task on each."""

    nodes: int = 1
    rank: int = 0
    head: str = ""
    """The first node's name."""
    port: int = 0

    @classmethod
    def from_environment(cls) -> NodePlace:
        """From what Slurm tells a task of a job step; one node where there is no such step.

        Raises:
            BadNodeError: Slurm does not say which nodes there are.
        """
        nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))
        if nodes == 1 or os.environ.get("SLURM_STEP_NUM_TASKS") != str(nodes):
            return cls()
        job = int(os.environ["SLURM_JOB_ID"])
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        # Another one after a restart: the old processes may still hold the last.
        port = _FIRST_PORT + (7 * job + restarts) % _PORTS
        return cls(nodes, int(os.environ["SLURM_NODEID"]), _first_node(), port)

    def for_torchrun(self) -> list[str]:
        """Its arguments for torchrun."""
        if self.nodes == 1:
            return ["--standalone"]
        return [f"--nnodes={self.nodes}", f"--node_rank={self.rank}",
                f"--master_addr={self.head}", f"--master_port={self.port}"]  # fmt: skip

    def for_accelerate(self) -> list[str]:
        """Its arguments for accelerate launch, which takes them from no file."""
        if self.nodes == 1:
            return ["--num_machines=1"]
        return [f"--num_machines={self.nodes}", f"--machine_rank={self.rank}",
                f"--main_process_ip={self.head}", f"--main_process_port={self.port}",
                "--rdzv_backend=static"]  # fmt: skip


def _first_node() -> str:
    names = os.environ["SLURM_STEP_NODELIST"]
    command = ["scontrol", "show", "hostnames", names]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise BadNodeError(f"The names of the nodes {names} cannot be read: {error}") from error
    return done.stdout.split()[0]


def is_launched() -> bool:
    """Whether a launcher (accelerate, torchrun, deepspeed) started this process."""
    return any(variable in os.environ for variable in _LAUNCHED)


def launch_command(config: RunConfig, stage: str, config_path: Path) -> list[str] | None:
    """The command that trains on this machine's devices; None to train in this process.

    Raises:
        BadNodeError: more processes are wanted than there are GPUs.
        ConfigError: the number of processes is none, or accelerate's file is missing.
    """
    if is_launched():
        return None
    gpus, wanted = _gpu_count(), config.train.processes
    processes = (gpus or 1) if wanted == "auto" else wanted
    if processes < 1:
        raise ConfigError(f"train.processes is {processes}", fix="Set it to auto, 1 or more.")
    program = ["-m", "medtrain", stage, str(config_path)]
    place = NodePlace.from_environment()
    if gpus == 0:
        if processes * place.nodes == 1:
            return None
        torchrun = [sys.executable, "-m", "torch.distributed.run", *place.for_torchrun()]
        return [*torchrun, f"--nproc_per_node={processes}", *program]
    if processes > gpus:
        raise BadNodeError(
            f"train.processes is {processes}, but this machine shows {gpus} GPUs",
            fix="Set train.processes=auto, or look at CUDA_VISIBLE_DEVICES.",
        )
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    if config.train.accelerate_config:
        command += ["--config_file", _existing(config.train.accelerate_config)]
    else:
        command += ["--mixed_precision=no", "--dynamo_backend=no"]
        command += ["--multi_gpu"] if processes * place.nodes > 1 else []
    total = f"--num_processes={processes * place.nodes}"
    return [*command, *place.for_accelerate(), total, *program]


def _existing(accelerate_config: str) -> str:
    path = Path(accelerate_config).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"train.accelerate_config: there is no file {path}",
            fix="Give a file that `accelerate config` wrote, or leave it out.",
        )
    return str(path)


def launch(run: Run, command: list[str], stage: str, console: Console) -> None:
    """Run a launch command to its end.

    Raises:
        MedtrainError: the child's own error, or one that names its exit code.
    """
    console.event("launch", f"{stage}: {' '.join(command[1:])}", stage=stage)
    rank = NodePlace.from_environment().rank
    log = run.logs / (f"{stage}.launch.{rank}.log" if rank else f"{stage}.launch.log")
    # An error of an earlier try must not pass for this one's.
    Lineage(run).forget_failure(stage)
    with log.open("wb") as said:
        code = _run_to_its_end(
            subprocess.Popen(
                command,
                env={**os.environ, **run.lock_environment()},
                stderr=None if DEBUG_VARIABLE in os.environ else said,
            )
        )
    if code == 0:
        return
    failure = Lineage(run).failure(stage)
    if failure is not None:
        raise from_exit_code(failure["exit_code"], failure["message"], failure["fix"])
    raise MedtrainError(
        f"The {stage} processes ended with exit code {code}",
        fix=f"What they said is in {log}. `medtrain run {run.config}` goes on from the last "
        "checkpoint.",
    )


def _run_to_its_end(child: subprocess.Popen[bytes]) -> int:
    """The exit code; an interrupt waits until the launcher has ended its processes."""
    try:
        return child.wait()
    except KeyboardInterrupt:
        # A terminal interrupts the launcher too, which needs a moment to end its workers.
        for stop in (child.terminate, child.kill):
            with suppress(subprocess.TimeoutExpired):
                child.wait(_STOP_WAIT_S)
            stop()
        child.wait()
        raise


def _gpu_count() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
