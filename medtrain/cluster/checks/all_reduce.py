"""All-reduce between two processes: started here for this machine, judged here for any.

On one machine: two `all_reduce_task`s over loopback, NCCL if there are two GPUs, else gloo. On a
cluster the probe job starts one on each node. A rank that does not answer is a finding too.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import AbstractContextManager

from medtrain.cluster.checks.asking import Child, ChildResult, start
from medtrain.cluster.checks.finding import Finding, failed, passed

STEP_S = 40.0
"""Time limit of one step of the all-reduce."""
DEADLINE_S = 90.0
"""For a rank as a whole, PyTorch's import included."""

_MODULE = "medtrain.cluster.checks.all_reduce_task"
_FIXES = {
    "rendezvous": "Does the head node's name resolve, and may tasks open ports above 1024? "
    "Name the interface: NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME in cluster.environment.",
    "connect": "The ranks met, but cannot connect to each other: a firewall, or the host's name "
    "leads to loopback. Set GLOO_SOCKET_IFNAME (one name) or NCCL_SOCKET_IFNAME.",
    "all-reduce": "Run it again with NCCL_DEBUG=INFO; NCCL_P2P_DISABLE=1 or NCCL_IB_DISABLE=1 "
    "show which transport is broken.",
}
_DEAD = "Run `python -m medtrain.cluster.checks.all_reduce_task 0 1 127.0.0.1 29555 20`."


def start_rank(
    rank: int, world: int, host: str, port: int, **environment: str
) -> AbstractContextManager[Child]:
    """Start one rank in a child process."""
    numbers = (str(rank), str(world), host, str(port), f"{STEP_S:g}")
    return start(_MODULE, *numbers, OMP_NUM_THREADS="1", **environment)


def start_local_ranks() -> list[AbstractContextManager[Child]]:
    """Start both ranks on this machine; `judge_ranks` waits for them."""
    port = _free_port()
    return [start_rank(rank, 2, "127.0.0.1", port, LOCAL_RANK=str(rank)) for rank in (0, 1)]


def check_local(ranks: Sequence[Child]) -> Finding:
    """Wait for the ranks on this machine, and judge them."""
    return judge_ranks("all-reduce", [rank.result(DEADLINE_S) for rank in ranks], "two processes")


def judge_ranks(check: str, results: Sequence[ChildResult], between: str) -> Finding:
    """One finding of what all ranks said."""
    for number, (found, problem) in enumerate(results):
        if problem:
            return failed(check, f"rank {number} of {len(results)}: {problem}", _DEAD)
        if "error" in found:
            step = found["step"]
            return failed(
                check,
                f"rank {number}, {step} on {found['head']}: {found['error']}",
                _FIXES[step],
                **found,
            )
    first = results[0].value
    shown = f"{first['backend']} between {between}, {first['mb_per_s']:,} MB/s"
    if not all(found["right"] for found, _ in results):
        return failed(check, f"wrong sum: {shown}", _FIXES["all-reduce"], **first)
    return passed(check, shown, **first)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
