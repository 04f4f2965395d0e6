"""The part `facts` of bench/gpu.py: what is there, and the ceilings that it sets.

versions → what the card is → its bandwidth for a copy, its arithmetic for a bfloat16 product, what
a launch costs the host → NF4 bytes made here and on the CPU → what `medtrain doctor` says.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from record import Record, milliseconds

PACKAGES = ("torch", "triton", "transformers", "trl", "peft", "accelerate", "bitsandbytes",
            "flash-attn", "liger-kernel", "medtrain")  # fmt: skip


def facts(record: Record) -> None:
    """Every fact."""
    record.figure("machine", ", ".join(f"{k} {v}" for k, v in versions().items()), **versions())
    record.attempt("card", lambda: _card(record), seconds=2)
    record.attempt("ceilings", lambda: _ceilings(record), seconds=5)
    record.attempt("nf4", lambda: _nf4(record), seconds=10)
    record.attempt("doctor", lambda: _doctor(record), seconds=25)


def versions() -> dict[str, str]:
    """Of Python and of what counts here, where it is installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def card_name() -> str:
    """Of the GPU, or CPU."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def _card(record: Record) -> None:
    import torch

    cudnn: Any = torch.backends.cudnn
    if not torch.cuda.is_available():
        record.figure("card", "none")
        return
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    record.figure(
        "card",
        f"{properties.name}, {total / 2**30:.0f} GiB ({free / 2**30:.0f} free), compute capability "
        f"{properties.major}.{properties.minor}, CUDA {torch.version.cuda}, "
        f"cuDNN {cudnn.version()}",
    )


def _ceilings(record: Record) -> None:
    import torch

    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    bandwidth = _copied_a_second(device, 2**31 if on_gpu else 2**22)
    wide = 8192 if on_gpu else 256
    one, other = (torch.randn(wide, wide, device=device, dtype=dtype) for _ in range(2))
    arithmetic = 2 * wide**3 / milliseconds(lambda: one @ other) / 1e9
    small = torch.zeros(1, device=device)
    began = time.perf_counter()
    for _ in range(1000):
        small.add_(1)
    launch_us = (time.perf_counter() - began) * 1e3
    record.figure(
        "ceilings",
        f"copy {bandwidth:.2f} TB/s, product {arithmetic:,.1f} TFLOP/s, a launch {launch_us:.1f} µs"
        " of the host",
        copy_tb_s=bandwidth, product_tflop_s=arithmetic, launch_us=launch_us,
    )  # fmt: skip


def _copied_a_second(device: str, size: int) -> float:
    """Terabytes read and written."""
    import torch

    source = torch.zeros(size, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * size / milliseconds(lambda: target.copy_(source)) / 1e9


def _nf4(record: Record) -> None:
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    torch.manual_seed(0)
    weight = torch.randn(512, 512) * 0.02
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    made = []
    for device in devices:
        packed, state = quantize_4bit(weight.to(device), quant_type="nf4", compress_statistics=True)
        made.append((packed.cpu(), dequantize_4bit(packed, state).cpu()))
    same = float((made[0][0] == made[-1][0]).float().mean())
    apart = float((made[0][1] - made[-1][1]).abs().max())
    record.figure("NF4 here and on the CPU", f"{same:.2%} of the bytes the same, {apart:.1e} apart")


def _doctor(record: Record) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "medtrain", "doctor", "--json"], capture_output=True, text=True,
        timeout=max(10.0, record.seconds_left), check=False,
    )  # fmt: skip
    told: dict[str, Any] = json.loads(done.stdout)
    failed = [check["check"] for check in told["checks"] if check["mark"] == "fail"]
    counts = ", ".join(f"{number} {mark}" for mark, number in told["counts"].items())
    record.figure("doctor", f"{counts}{': ' if failed else ''}{', '.join(failed)}")
