"""What is started on a node: commands that the launchers understand, and a clean environment."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from medtrain.config.training import Strategy
from medtrain.launch.command import Node, command, environment
from medtrain.launch.meeting import Meeting
from medtrain.launch.place import NodePlace
from medtrain.launch.strategy_files import strategy_file, strategy_of_file
from tests.launch.conftest import config

STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
PROGRAM = ["-m", "medtrain", "sft", "c.yaml"]
SECOND = NodePlace(nodes=2, rank=1, name="node2", job=7, restarts=3, step="1")


def parsed(arguments: list[str]) -> Any:
    """The command as accelerate reads it, together with its file."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    assert arguments[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    return _validate_launch_command(launch_command_parser().parse_args(arguments[3:]))[0]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategys_file_is_what_it_says(strategy: Strategy) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    file = strategy_file(strategy)
    assert load_config_from_file(str(file)).mixed_precision == "no"
    assert strategy_of_file(str(file)) == (file, strategy)
    assert f"--config_file configs/accelerate/{file.name} " in file.read_text().splitlines()[0]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_accelerate_understands_the_command_on_gpus(strategy: Strategy) -> None:
    seen = parsed(
        command(config(), PROGRAM, Node(SECOND, 4, 4), Meeting(strategy, "node1", 20_007))
    )
    assert (seen.num_machines, seen.machine_rank, seen.num_processes) == (2, 1, 8)
    assert (seen.main_process_ip, seen.main_process_port) == ("node1", 20_007)
    assert (seen.rdzv_backend, seen.same_network) == ("static", True)
    kinds = {"ddp": seen.multi_gpu, "fsdp2": seen.use_fsdp}
    assert kinds.get(strategy, seen.use_deepspeed)
    assert [seen.multi_gpu, seen.use_fsdp, seen.use_deepspeed].count(True) == 1
    if seen.use_deepspeed:
        assert seen.zero_stage == (2 if strategy == "zero2" else 3)
        assert seen.offload_param_device == ("cpu" if strategy == "zero3-offload" else "none")
        assert seen.deepspeed_multinode_launcher == "standard"
    assert [seen.module, seen.training_script, *seen.training_script_args] == [True, *PROGRAM[1:]]


def test_a_file_of_the_users_takes_the_strategys_place(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(strategy_file("zero3").read_text())
    given = config(accelerate_config=str(own))
    started = command(given, PROGRAM, Node(NodePlace(), 2, 2), Meeting("zero3"))
    assert f"--config_file={own}" in started
    assert parsed(started).zero_stage == 3


def test_one_process_needs_no_launcher() -> None:
    started = command(config(), PROGRAM, Node(NodePlace(), 1, 8), Meeting("ddp"))
    assert started == [sys.executable, *PROGRAM]


def test_torchrun_starts_plain_data_parallelism_on_cpus() -> None:
    from torch.distributed.run import get_args_parser

    started = command(config(), PROGRAM, Node(SECOND, 2, 0), Meeting("ddp", "node1", 20_007))
    assert started[1:3] == ["-m", "torch.distributed.run"]
    seen = get_args_parser().parse_args(started[3:])
    assert (seen.nproc_per_node, seen.nnodes, seen.node_rank) == ("2", "2", 1)
    assert (seen.master_addr, seen.master_port, seen.rdzv_backend) == ("node1", 20_007, "static")
    assert [seen.module, seen.training_script, *seen.training_script_args] == [True, *PROGRAM[1:]]


def test_the_environment_holds_nothing_of_another_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    misleading = ("SLURM_CPU_BIND", "SLURM_CPU_BIND_LIST", "PMI_RANK", "PMIX_RANK", "WORLD_SIZE",
                  "OMPI_COMM_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID",
                  "ACCELERATE_USE_CPU", "FSDP_VERSION", "DS_ACCELERATOR")  # fmt: skip
    users = {"NCCL_SOCKET_IFNAME": "ib0", "GLOO_SOCKET_IFNAME": "lo", "SLURM_JOB_ID": "7",
             "HF_TOKEN": "t", "PATH": "/bin"}  # fmt: skip
    for name in misleading:
        monkeypatch.setenv(name, "1")
    for name, value in users.items():
        monkeypatch.setenv(name, value)
    made = environment(Node(SECOND, 2, 2), Meeting("ddp", "node1", 20_007))
    assert not set(misleading) & set(made)
    assert users.items() <= made.items()
    assert made["MEDTRAIN_STRATEGY"] == "ddp"
    assert made["PET_RDZV_ID"] == "7.3.1"


def test_deepspeed_on_a_cpu_is_told_so() -> None:
    on_cpu = environment(Node(NodePlace(), 2, 0), Meeting("zero3"))
    assert (on_cpu["ACCELERATE_TORCH_DEVICE"], on_cpu["DS_ACCELERATOR"]) == ("cpu", "cpu")
    on_gpu = environment(Node(NodePlace(), 2, 2), Meeting("zero3"))
    assert on_gpu["PATH"].startswith(str(Path(sys.executable).parent)), "where ninja lies"
    assert not {"ACCELERATE_TORCH_DEVICE", "DS_ACCELERATOR"} & set(on_gpu)


@pytest.mark.parametrize(("cores", "processes", "threads"), [("8", 2, "4"), ("1", 2, "1")])
def test_the_cores_of_the_task_are_shared(
    monkeypatch: pytest.MonkeyPatch, cores: str, processes: int, threads: str
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(64))
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", cores)
    node = Node(NodePlace(), processes, 0)
    assert environment(node, Meeting("ddp"))["OMP_NUM_THREADS"] == os.environ["OMP_NUM_THREADS"]
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert environment(node, Meeting("ddp"))["OMP_NUM_THREADS"] == threads
