"""Nodes find each other: at a port that is free, in this try of this job, or not at all."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medtrain.errors import BadNodeError
from medtrain.launch.meeting import Meeting, agreed, free_port, ports
from medtrain.launch.place import NodePlace
from medtrain.run import Run

HEAD = NodePlace(nodes=2, rank=0, name="localhost", job=41, restarts=1, step="0")
OTHER = NodePlace(nodes=2, rank=1, name="localhost", job=41, restarts=1, step="0")
STEP = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "41",
        "SLURM_STEP_ID": "0", "SLURMD_NODENAME": "localhost"}  # fmt: skip


@given(st.integers(0, 10**9), st.integers(0, 50))
def test_ports_are_many_valid_and_other_ones_after_a_restart(job: int, restarts: int) -> None:
    place = NodePlace(nodes=2, job=job, restarts=restarts)
    again = NodePlace(nodes=2, job=job, restarts=restarts + 1)
    assert len(set(ports(place))) == len(ports(place)) > 1
    assert all(20_000 <= port < 30_000 for port in ports(place))
    assert ports(place)[0] != ports(again)[0]


def test_a_port_that_is_taken_is_not_agreed_on(run: Run) -> None:
    first, second = free_port(HEAD), ports(HEAD)[ports(HEAD).index(free_port(HEAD)) + 1]
    with (
        socket.create_server(("127.0.0.1", first)),
        agreed(run, "sft", HEAD, lambda: "zero3") as head,
    ):
        assert head.port != first
        assert head.port in ports(HEAD)[ports(HEAD).index(second) :]
        with agreed(run, "sft", OTHER, never) as other:
            assert other == head == Meeting("zero3", "localhost", head.port)


def never() -> str:
    raise AssertionError("only the head node decides")


def test_what_an_earlier_try_published_is_not_taken(run: Run) -> None:
    earlier = NodePlace(nodes=2, rank=0, name="gone", job=41, restarts=0, step="0")
    leftover = run.stages / f"sft.meeting.{earlier.meeting}"
    leftover.write_text('{"strategy": "ddp", "head": "gone", "port": 1}')
    with (
        pytest.raises(BadNodeError, match="has published no"),
        agreed(run, "sft", OTHER, never, wait_s=0.0),
    ):
        pass
    with agreed(run, "sft", HEAD, lambda: "ddp") as meeting:
        assert meeting.head == "localhost"
        assert not leftover.exists()
    assert not list(run.stages.glob("*.meeting.*"))


def test_one_node_needs_no_meeting(run: Run) -> None:
    with agreed(run, "sft", NodePlace(), lambda: "zero2") as meeting:
        assert meeting == Meeting("zero2")
    assert not list(run.stages.iterdir())


def test_a_place_comes_from_a_task_of_several_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert NodePlace.from_environment() == NodePlace()
    for name, value in {**STEP, "SLURM_NODEID": "1", "SLURM_RESTART_COUNT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert NodePlace.from_environment() == OTHER
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")  # tasks that are no nodes
    assert NodePlace.from_environment() == NodePlace()


NODE = """
import os, sys
from pathlib import Path
from medtrain.launch.command import Node, command, environment
from medtrain.launch.meeting import agreed
from medtrain.launch.place import NodePlace
from medtrain.launch.processes import Processes
from medtrain.run import Run
from tests.launch.conftest import config

place = NodePlace.from_environment()
with agreed(Run(Path(sys.argv[1])), "sft", place, lambda: sys.argv[2]) as meeting:
    node = Node(place, 2 // place.nodes, 0)
    started = command(config(), [sys.argv[3]], node, meeting)
    sys.exit(Processes(started, environment(node, meeting), None).run())
"""


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_two_nodes_meet_and_sum_a_number(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    node, script = tmp_path / "node.py", tmp_path / "script.py"
    node.write_text(NODE)
    script.write_text(SUM)
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    nodes = []
    for rank in (1, 0):  # the head comes last
        monkeypatch.setenv("SLURM_NODEID", str(rank))
        command = [sys.executable, str(node), str(run.root), strategy, str(script)]
        nodes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                      text=True))  # fmt: skip
    said = [one.communicate(timeout=200) for one in nodes]
    assert [one.returncode for one in nodes] == [0, 0], said
    expected = "MULTI_CPU" if strategy == "ddp" else "DEEPSPEED"
    for rank, (out, _) in zip((1, 0), said, strict=True):
        assert f"DistributedType.{expected} {rank} of 2: 3.0 {strategy} 41.0.0" in out


def test_two_processes_of_one_node_shard_with_zero3(run: Run, tmp_path: Path) -> None:
    node, script = tmp_path / "node.py", tmp_path / "script.py"
    node.write_text(NODE)
    script.write_text(SUM.replace(" {os.environ['TORCHELASTIC_RUN_ID']}", ""))
    done = subprocess.run(
        [sys.executable, str(node), str(run.root), "zero3", str(script)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert f"DistributedType.DEEPSPEED {rank} of 2: 3.0 zero3" in done.stdout


SUM = """
import os, torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from medtrain.ending import Ending
from medtrain.launch.worker import begin
from medtrain.train.sharded import do_without_compiled_op

ending = Ending.register()
begin()
strategy = os.environ["MEDTRAIN_STRATEGY"]
backend = [InitProcessGroupKwargs(backend="gloo")]
if strategy != "ddp":
    do_without_compiled_op()
accelerator = Accelerator(cpu=strategy == "ddp", kwargs_handlers=backend)
total = torch.tensor(accelerator.process_index + 1.0)
torch.distributed.all_reduce(total)
print(f"{accelerator.distributed_type} {accelerator.process_index} of {accelerator.num_processes}: "
      f"{total.item()} {strategy} {os.environ['TORCHELASTIC_RUN_ID']}", flush=True)
accelerator.end_training()
ending.code = 0
"""
