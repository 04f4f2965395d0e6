"""Too little GPU memory while answering: half as many rows at a time, down to one.

Rows that had not ended begin again, with the seeds they had.
"""

from __future__ import annotations

import gc

import torch

from medtrain.console import Console
from medtrain.errors import MedtrainError


def say_halved(console: Console, tried: int, now: int) -> None:
    """Tell that fewer rows are answered at a time from now on."""
    console.warn(
        "too_little_memory",
        f"Too little GPU memory to answer {tried} rows at a time: going on with {now}",
        tried=tried,
        rows=now,
    )


def too_little_memory() -> MedtrainError:
    """What to raise where halving has come to its end."""
    return MedtrainError(
        "Too little GPU memory to answer even one row at a time",
        fix="Lower max_new_tokens of this stage (`generate:` or `evaluate:`), see what else uses "
        "the GPU (nvidia-smi), or take one with more memory; finished rows are kept.",
    )


def release_memory() -> None:
    """Give unused blocks back to the GPU; cycles may still hold some."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
