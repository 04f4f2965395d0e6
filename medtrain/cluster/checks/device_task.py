"""In a process of its own: what PyTorch sees of this machine, and whether its kernels run.

Prints one JSON object. A small matrix is quantised to NF4 with double quantisation, multiplied by
the kernel that QLoRA trains with, and compared with the product of the dequantised matrix. Packed
rows attend by every kernel that should fit, until one gives what row by row gives.
"""

from __future__ import annotations

import json
import time
from typing import Any

MOST_DIFFERENCE = 0.03
"""Between kernel and dequantised product, as a share of the largest entry; bfloat16 has 8 bits."""
MOST_ROUNDING = 0.2
"""Mean rounding of NF4 as a share of the mean weight; about 0.08 for normal weights."""


def main() -> None:
    """Look, and print what was found."""
    from medtrain.console import quiet_libraries

    quiet_libraries()
    found = _devices()
    try:
        found["nf4"] = nf4_product("cuda:0" if found["devices"] else "cpu")
    except (ImportError, RuntimeError, NotImplementedError, AttributeError, OSError) as error:
        found["nf4"] = {"error": f"{type(error).__name__}: {error}"}
    try:
        found["attention"] = packed_attention("cuda:0" if found["devices"] else "cpu")
    except (ImportError, RuntimeError) as error:
        found["attention"] = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(found), flush=True)


def _devices() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda_build": torch.version.cuda,
        "hip_build": getattr(torch.version, "hip", None),
        "devices": [],
    }
    if not torch.cuda.is_available():
        return found
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found["devices"].append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gb": round(total / 2**30, 1),
                "free_gb": round(free / 2**30, 1),
            }
        )
    found["bf16"] = torch.cuda.is_bf16_supported(including_emulation=False)
    return found


def nf4_product(device: str) -> dict[str, Any]:
    """Multiply by an NF4 matrix, and say how far off the product is."""
    import bitsandbytes
    import torch
    from bitsandbytes import functional

    dtype = _half_or_whole(device)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(128, 256, generator=generator).to(device, dtype)  # (out, in)
    rows = torch.randn(8, 256, generator=generator).to(device, dtype)  # (rows, in)
    started = time.perf_counter()
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    plain = functional.dequantize_4bit(packed, state).float()
    product = bitsandbytes.matmul_4bit(rows, packed.t(), quant_state=state).float()
    expected = rows.float() @ plain.t()
    difference = _number((product - expected).abs().max() / expected.abs().max())
    rounding = _number((plain - weight.float()).abs().mean() / weight.float().abs().mean())
    return {
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "difference": round(difference, 6),
        "rounding": round(rounding, 4),
        "seconds": round(time.perf_counter() - started, 3),
        "right": difference <= MOST_DIFFERENCE and rounding <= MOST_ROUNDING,
    }


def packed_attention(device: str) -> dict[str, Any]:
    """The kernel that packed rows attend by, with heads like those of an 8B model."""
    import torch

    from medtrain.attention.trial import Shape, settled

    dtype = _half_or_whole(device)
    shape = Shape(torch.device(device), dtype, heads=32, kv_heads=8, head_dim=128, windowed=False)
    choice = settled(shape)
    return {**choice._asdict(), "dtype": str(dtype).removeprefix("torch.")}


def _half_or_whole(device: str) -> Any:
    """The precision that a model is best computed with."""
    import torch

    if device == "cpu":
        return torch.float32
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if bf16 else torch.float16


def _number(value: Any) -> float:
    """A float that JSON has: a kernel that gives NaN is far off, and does not break the report."""
    import torch

    return float(torch.nan_to_num(value, nan=1e9, posinf=1e9))


if __name__ == "__main__":
    main()
