"""GPUs, the NF4 kernel and attention: starts `device_task`, and judges what it found.

PyTorch sees GPUs → their memory, bfloat16, the kernel on the first. It sees none, but the driver
does → the build is the wrong one. Neither → a machine without a GPU, which is fit for everything
but real training.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from medtrain.attention.choice import KERNELS
from medtrain.cluster.checks.asking import Child, ask, start
from medtrain.cluster.checks.finding import Finding, failed, passed, skipped, warned
from medtrain.config import RunConfig

DEADLINE_S = 120.0
"""For importing PyTorch and bitsandbytes from a slow file system, and one small kernel."""
_SMALL_GB = 1.0
_INSTALL = "Install the build for your CUDA: https://pytorch.org/get-started/locally"


def start_device_task() -> AbstractContextManager[Child]:
    """Start looking; `check_devices` waits for the answer."""
    return start("medtrain.cluster.checks.device_task")


def check_devices(task: Child, config: RunConfig | None) -> list[Finding]:
    """CUDA and NF4."""
    found, problem = task.result(DEADLINE_S)
    if problem:
        fix = "Run `python -m medtrain.cluster.checks.device_task` to see all of what it says."
        return [
            failed("cuda", f"looking at the devices ended badly: {problem}", fix),
            skipped("nf4 kernel", "the devices could not be looked at"),
            skipped("attention", "the devices could not be looked at"),
        ]
    return [_cuda(found), nf4(found["nf4"], config), attention(found["attention"])]


def _cuda(found: dict[str, Any]) -> Finding:
    build = found["cuda_build"] or found["hip_build"]
    built = f"torch {found['torch']} built for {f'CUDA {build}' if build else 'CPUs only'}"
    driver = ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    versions = driver.out.split() if driver.ok else []
    facts = {"build": build, "driver": versions[0] if versions else None, **found}
    devices = found["devices"]
    if not devices and versions:
        why = "torch has no CUDA" if not build else f"the driver {versions[0]} may be too old"
        return failed(
            "cuda", f"{len(versions)} GPUs here, but PyTorch sees none: {why} ({built})",
            _INSTALL + ", or unset CUDA_VISIBLE_DEVICES if it hides them.", **facts,
        )  # fmt: skip
    if not devices:
        return warned("cuda", f"no GPU on this machine ({built})",
                      "Fine on a login node; training a real model needs a GPU node.",
                      **facts)  # fmt: skip
    names = sorted({f"{d['name']} {d['memory_gb']:g} GB" for d in devices})
    shown = f"{len(devices)} x {', '.join(names)}; {built}"
    shown += f", driver {versions[0]}" if versions else ""
    if any(device["free_gb"] < _SMALL_GB for device in devices):
        return warned("cuda", f"{shown}; a GPU is full", "See `nvidia-smi` for who uses it.",
                      **facts)  # fmt: skip
    if not found["bf16"]:
        return warned("cuda", f"{shown}; no bfloat16", "Set model.dtype=float16.", **facts)
    return passed("cuda", f"{shown}, bf16", **facts)


def attention(found: dict[str, Any]) -> Finding:
    """Judge how packed rows attend: row by row costs a GPU time."""
    if "error" in found:
        return failed("attention", f"cannot be tried: {found['error']}",
                      "Is the GPU full? See `nvidia-smi`.", **found)  # fmt: skip
    shown = f"packed rows by {found['kernel']}: {KERNELS[found['kernel']]}, in {found['dtype']}"
    shown += f" ({found['reason']})" if found["reason"] else ""
    if found.get("surprising") or (found["kernel"] == "rows" and found["dtype"] != "float32"):
        return warned("attention", shown, "Install PyTorch 2.10 or newer, or flash-attn.", **found)
    return passed("attention", shown, **found)


def nf4(found: dict[str, Any], config: RunConfig | None) -> Finding:
    """Judge what the NF4 kernel gave; a run without quantisation does not need it."""
    needed = config is None or config.model.quantization == "nf4"
    kind = failed if needed else warned
    fix = "pip install --upgrade bitsandbytes, or set model.quantization=none."
    if "error" in found:
        return kind("nf4 kernel", f"does not run: {found['error']}", fix, **found)
    shown = (
        f"runs on {found['device']} in {found['dtype']}, {found['difference']:.2g} from the "
        f"dequantised product, rounding {found['rounding']:.2f}"
    )
    if not found["right"]:
        return kind("nf4 kernel", f"wrong result: {shown}", fix, **found)
    return passed("nf4 kernel", shown, **found)
