"""In a process of its own: one rank of an all-reduce, with a time limit at every step.

rendezvous on the head's address → the ranks tell each other their GPUs → NCCL where everyone has
one of its own, else gloo → sum, bandwidth, and how far the ranks' clocks are apart. Prints one JSON
object that says how far it came, so that a firewall is told from a broken library.

    python -m medtrain.cluster.checks.all_reduce_task RANK WORLD HOST PORT SECONDS
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from typing import Any

from medtrain.ending import Ending

_NUMBERS = 4 * 2**20
"""Float32 numbers of the measured all-reduce: 16 MiB."""
_REPEATS = 3
_NO_GPU = "none"


def all_reduce(rank: int, world: int, host: str, port: int, timeout_s: float) -> dict[str, Any]:
    """Take part as one rank; the answer has an `error` and its `step` where it went wrong."""
    import torch
    from torch import distributed

    found: dict[str, Any] = {"rank": rank, "step": "rendezvous", "head": f"{host}:{port}"}
    timeout = timedelta(seconds=timeout_s)
    try:
        store = _store(rank, world, host, port, timeout)
        found["step"] = "connect"
        found["backend"] = _agreed_backend(store, rank, world)
        distributed.init_process_group(
            found["backend"],
            store=store,
            rank=rank,
            world_size=world,
            timeout=timeout,
        )
        found["step"] = "all-reduce"
        device = torch.device("cpu" if found["backend"] == "gloo" else f"cuda:{_local_rank()}")
        found.update(_measure(rank, world, device))
        found["step"] = "done"
        distributed.destroy_process_group()
    except RuntimeError as error:
        found["error"] = str(error).strip().splitlines()[0]
    return found


def _store(rank: int, world: int, host: str, port: int, timeout: timedelta) -> Any:
    from torch import distributed

    # These classes are compiled, and PyTorch's stubs do not export them.
    known: Any = distributed
    store = known.TCPStore(host, port, world, is_master=rank == 0, timeout=timeout)
    return known.PrefixStore("medtrain", store)


def _local_rank() -> int:
    """The GPU of this rank; Slurm may show each task its own GPU only."""
    import torch

    local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    return local % max(torch.cuda.device_count(), 1)


def _agreed_backend(store: Any, rank: int, world: int) -> str:
    import torch

    mine = _NO_GPU
    if torch.cuda.is_available() and torch.distributed.is_nccl_available():
        mine = str(torch.cuda.get_device_properties(_local_rank()).uuid)
    store.set(f"gpu/{rank}", mine)
    gpus = [store.get(f"gpu/{other}").decode() for other in range(world)]
    # NCCL refuses two ranks on one GPU.
    return "nccl" if _NO_GPU not in gpus and len(set(gpus)) == world else "gloo"


def _measure(rank: int, world: int, device: Any) -> dict[str, Any]:
    import torch
    from torch import distributed

    if device.type == "cuda":
        torch.cuda.set_device(device)
    ranks = torch.full((1,), float(rank + 1), device=device)
    distributed.all_reduce(ranks)
    numbers = torch.ones(_NUMBERS, device=device)
    started = time.perf_counter()
    for _ in range(_REPEATS):
        distributed.all_reduce(numbers)
    last = numbers[-1].item()  # waits for the device
    seconds = (time.perf_counter() - started) / _REPEATS
    distributed.barrier()
    now = torch.tensor([time.time()], dtype=torch.float64, device=device)
    clocks = [torch.zeros_like(now) for _ in range(world)]
    distributed.all_gather(clocks, now)
    times = [clock.item() for clock in clocks]
    return {
        "right": ranks.item() == world * (world + 1) / 2 and last == world**_REPEATS,
        "mb_per_s": round(numbers.nbytes / 1e6 / seconds),
        "clock_skew_s": round(max(times) - min(times), 3),
    }


def main() -> None:
    """Take part in the all-reduce that the arguments describe, and print what was found."""
    ending = Ending.register()
    rank, world, host, port, timeout_s = sys.argv[1:]
    found = all_reduce(int(rank), int(world), host, int(port), float(timeout_s))
    print(json.dumps(found), flush=True)
    ending.code = 0


if __name__ == "__main__":
    main()
