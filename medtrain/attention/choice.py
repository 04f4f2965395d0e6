"""Which kernel computes the attention of packed rows: one function, from facts, with reasons.

facts (device, precision, size of a head, what is installed) → every kernel that fits, the
best first, and why each of the others does not → `Choice`. No library is loaded for it: a plan asks
about GPUs that are not here.

A sequence of rows of n1, n2, … tokens costs attention over n1² + n2² + … pairs. `varlen`, `flash`
and `efficient` compute it in one call; `rows` calls once a row, which a GPU spends on launches.
Where rows are longer than a window, the kernels that know none leave the pass to `rows`.
"""

from __future__ import annotations

import importlib.util
import re
from importlib.metadata import PackageNotFoundError, version
from typing import Literal, NamedTuple

Kernel = Literal["varlen", "flash", "efficient", "rows"]
Wanted = Literal["auto", "sdpa", "flash_attention_2"]
"""`model.attention`, as far as rows are packed with it."""

KERNELS: dict[Kernel, str] = {
    "varlen": "PyTorch's variable-length flash attention, one call for all rows",
    "flash": "flash-attn's variable-length kernel, one call for all rows",
    "efficient": "PyTorch's memory-efficient attention, one call for all rows",
    "rows": "PyTorch's attention, row by row",
}
"""The best first."""

_AMPERE = (8, 0)
"""The compute capability that flash attention begins with."""
_VARLEN_SINCE = (2, 10)
"""The release of PyTorch that `torch.nn.attention.varlen` came with."""
_LARGEST_HEAD = 256


class Facts(NamedTuple):
    """What the choice depends on."""

    capability: tuple[int, int] | None
    """CUDA's compute capability; None for a CPU."""
    bytes_each: int
    """Of a number that is computed with: flash attention has 16-bit kernels only."""
    head_dim: int
    """Elements of a head."""
    torch: tuple[int, int]
    """Release of PyTorch."""
    flash_attn: bool
    """Whether the package flash-attn is installed."""


class Choice(NamedTuple):
    """A kernel, and why not a better one."""

    kernel: Kernel
    reason: str
    surprising: bool = False
    """Whether a better one was there and did not work, which nobody could know before."""

    @property
    def repeats_groups(self) -> bool:
        """Whether, on a GPU, keys and values are repeated for the queries that share them."""
        return self.kernel in ("efficient", "rows")

    def __str__(self) -> str:
        said = f"{self.kernel} ({KERNELS[self.kernel]})"
        return f"{said}; {self.reason}" if self.reason else said


def choose(facts: Facts, wanted: Wanted = "auto") -> list[Choice]:
    """The kernels that fit, best first; each with the reasons against those before it.

    Args:
        facts: device, precision and shape.
        wanted: `sdpa` leaves flash-attn out, `flash_attention_2` leaves out everything else.
    """
    if facts.capability is None:
        return [] if wanted == "flash_attention_2" else [Choice("rows", "no GPU")]
    found: list[Choice] = []
    against: list[str] = []
    for kernel in KERNELS:
        why_not = _why_not(kernel, facts, wanted)
        if why_not is None:
            found.append(Choice(kernel, ", ".join(against)))
        else:
            against.append(f"no {kernel}: {why_not}")
    return found


def _why_not(kernel: Kernel, facts: Facts, wanted: Wanted) -> str | None:
    if (kernel == "flash") != (wanted == "flash_attention_2") and wanted != "auto":
        return f"model.attention is {wanted}"
    if kernel in ("efficient", "rows"):
        return None
    assert facts.capability is not None
    if kernel == "flash" and not facts.flash_attn:
        return "flash-attn is not installed"
    if kernel == "varlen" and facts.torch < _VARLEN_SINCE:
        return f"PyTorch {facts.torch[0]}.{facts.torch[1]} has none"
    if facts.bytes_each != 2:
        return "it computes in 16 bits only"
    if facts.capability < _AMPERE:
        return "a GPU of compute capability {}.{} is too old".format(*facts.capability)
    if facts.head_dim > _LARGEST_HEAD or facts.head_dim % 8:
        return f"it takes no heads of {facts.head_dim} elements"
    return None


def installed_facts(capability: tuple[int, int] | None, bytes_each: int, head_dim: int) -> Facts:
    """The facts with what is installed here; the arguments are those of `Facts`."""
    return Facts(
        capability,
        bytes_each,
        head_dim,
        _release("torch"),
        importlib.util.find_spec("flash_attn") is not None,
    )


def _release(package: str) -> tuple[int, int]:
    try:
        found = re.match(r"(\d+)\.(\d+)", version(package))
    except PackageNotFoundError:
        found = None
    return (int(found[1]), int(found[2])) if found else (0, 0)
