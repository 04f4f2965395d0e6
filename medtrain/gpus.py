"""How fast a GPU is and how much it holds, and how large a model: what a plan is made from.

`cluster.gpu_type` and `constraint` → a row of the table (dense tensor-core peak and memory
bandwidth, as NVIDIA's data sheets give them; memory as PyTorch reports it, which is less than the
name says) → seconds, by the shares of both that are reached. `model.base` → parameters, from a
directory's safetensors headers or from the name.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path

from medtrain.config import Resources

TRAINING_SHARE = 0.3
"""Of the peak FLOP/s that training and reading prompts reach."""
DECODING_SHARE = 0.4
"""Of the memory bandwidth that decoding reaches."""
STEP_FLOOR_S = {"transformers": 0.025, "vllm": 0.005}
"""A decoding step takes this long however small the model: Python and kernel launches."""
AT_WORK = 1.25
"""Memory of a model that answers or is merged, as a multiple of its weights."""
LOAD_BYTES_PER_S = 1e9
"""At which weights come from a shared file system."""
START_S = 30.0
"""From a job's start to the first byte of weights: modules, activation, imports."""

_AMPERE = (8, 0)
_SCALE = {"b": 1e9, "m": 1e6}
_IN_NAME = re.compile(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Gpu:
    """One type, by its data sheet."""

    name: str
    peak_flops: float
    """Dense tensor-core peak in bf16 (V100, T4: fp16), FLOP/s."""
    bytes_per_s: float
    """Memory bandwidth."""
    memory_gib: float
    """As torch.cuda.get_device_properties reports it."""
    float32_flops: float
    """Peak without tensor cores, FLOP/s."""
    capability: tuple[int, int]
    """CUDA's compute capability."""

    @property
    def bfloat16(self) -> bool:
        """Whether it computes bfloat16 itself; else PyTorch does so in float32."""
        return self.capability >= _AMPERE

    @property
    def memory_bytes(self) -> int:
        """What a process may take."""
        return int(self.memory_gib * 2**30)

    @property
    def auto_bytes(self) -> int:
        """Bytes of a number where `model.dtype` is `auto`."""
        return 2 if self.bfloat16 else 4

    def flops(self, dtype: str) -> float:
        """Peak FLOP/s in `model.dtype`, whose `auto` is float32 where there is no bfloat16."""
        slow = dtype == "float32" or (not self.bfloat16 and dtype in ("bfloat16", "auto"))
        return self.float32_flops if slow else self.peak_flops

    def compute_s(self, flops: float, dtype: str = "bfloat16") -> float:
        """Seconds of work that is bound by arithmetic."""
        return flops / (self.flops(dtype) * TRAINING_SHARE)

    def decode_step_s(
        self, parameters: float, bytes_each: int, rows: float, floor: float, dtype: str = "bfloat16"
    ) -> float:
        """Seconds in which `rows` sequences each get one more token.

        Every weight is read once a step; with many sequences arithmetic is the bound.
        """
        reading = parameters * bytes_each / (self.bytes_per_s * DECODING_SHARE)
        return max(floor, reading, self.compute_s(2 * parameters * rows, dtype))


# More specific names first: a type is looked up as a part of what the site calls it.
_GPUS = {
    "h200": Gpu("H200 SXM", 989e12, 4.8e12, 139.8, 67e12, (9, 0)),
    "h100": Gpu("H100 SXM", 989e12, 3.35e12, 79.1, 67e12, (9, 0)),
    "a100": Gpu("A100 40 GB", 312e12, 1.555e12, 39.4, 19.5e12, (8, 0)),
    "v100": Gpu("V100 SXM2 16 GB", 125e12, 0.9e12, 15.7, 15.7e12, (7, 0)),
    "l40s": Gpu("L40S", 362e12, 0.864e12, 44.4, 91.6e12, (8, 9)),
    "a6000": Gpu("RTX A6000", 155e12, 0.768e12, 47.4, 38.7e12, (8, 6)),
    "a10": Gpu("A10", 125e12, 0.6e12, 22.0, 31.2e12, (8, 6)),
    "4090": Gpu("RTX 4090", 165e12, 1.008e12, 23.5, 82.6e12, (8, 9)),
    "l4": Gpu("L4", 121e12, 0.3e12, 22.0, 30.3e12, (8, 9)),
    "t4": Gpu("T4", 65e12, 0.32e12, 14.6, 8.1e12, (7, 5)),
}
KNOWN = tuple(sorted(_GPUS))
"""Words by which a GPU is known."""
_LARGER = {
    "a100": ("80", Gpu("A100 80 GB", 312e12, 2.039e12, 79.1, 19.5e12, (8, 0))),
    "v100": ("32", Gpu("V100 SXM2 32 GB", 125e12, 0.9e12, 31.7, 15.7e12, (7, 0))),
}
"""The same type with more memory, and the number by which it is known."""
DEFAULT_GPU = _GPUS["a100"]


def gpu_of(wanted: Resources) -> Gpu | None:
    """The type that a job asks for, in words that the table knows; None if it names none.

    `a100` without a size is the smaller one; `a100-80gb`, `a100_80g` and `A100-SXM4-80GB` are not.
    """
    asked = (wanted.gpu_type, wanted.constraint, wanted.partition)
    return next((gpu for word in asked if word and (gpu := gpu_named(word))), None)


def gpu_named(word: str) -> Gpu | None:
    """The type of a word of a site, or of the name that the driver gives; None if it is unknown."""
    word = word.lower()
    for name, gpu in _GPUS.items():
        if _is_named(name, word):
            size, larger = _LARGER.get(name, ("", gpu))
            sizes = re.findall(r"(?<![0-9a-z])\d+(?=g|$|[^0-9a-z])", word)
            return larger if size in sizes else gpu
    return None


def _is_named(name: str, asked: str) -> bool:
    """Whether a site's word names a type; short names could be a part of another word."""
    if len(name) > 3:
        return name in asked
    return re.search(rf"(?<![a-z0-9]){name}(?![0-9])", asked) is not None


def parameters_of(model: str) -> float | None:
    """Parameters of a model directory, or of a hub id whose name tells; None if nothing does."""
    directory = Path(model).expanduser()
    return _stored(directory) or _named(directory.name)


def _named(name: str) -> float | None:
    """8e9 for `Meta-Llama-3-8B`; None for a mixture such as `8x7B`, which computes with a part."""
    found = _IN_NAME.search(name)
    return float(found[1]) * _SCALE[found[2].lower()] if found else None


def _stored(directory: Path) -> float | None:
    """The elements of all tensors, by the headers of the safetensors files."""
    counts = [_tensor_elements(file) for file in sorted(directory.glob("model*.safetensors"))]
    known = [count for count in counts if count is not None]
    return float(sum(known)) if known and len(known) == len(counts) else None


def _tensor_elements(file: Path) -> int | None:
    """See https://huggingface.co/docs/safetensors: eight bytes of length, then a JSON header."""
    try:
        with file.open("rb") as handle:
            header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
        return int(sum(prod(t["shape"]) for name, t in header.items() if name != "__metadata__"))
    except (OSError, ValueError, KeyError, TypeError, MemoryError, OverflowError):
        return None  # whoever loads it says what is wrong with it
