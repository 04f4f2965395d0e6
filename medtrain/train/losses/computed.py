"""A forward pass's loss with the figures about it, as tensors that nobody has looked at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

Sum = Tensor | float
"""A number: on the device, or known to the host."""


class Ratio(NamedTuple):
    """A mean, as what it is made of: those of several passes and processes are added up apart."""

    total: Sum
    of: Sum
    """How many were added up."""


class Computed(NamedTuple):
    """What a trainer makes of a forward pass."""

    loss: Tensor
    """(), of this process."""
    figures: Mapping[str, Ratio]
    """By TRL's names; the same ones in the same order in every pass and process."""
    tokens: Sum
    """That were read."""


def mean(values: Tensor) -> Ratio:
    """The mean of (n,) values."""
    return Ratio(values.detach().sum(), float(len(values)))


def token_mean(values: Tensor, mask: Tensor) -> Ratio:
    """The mean of (rows, length) values where the mask is set."""
    return Ratio((values.detach() * mask).sum(), mask.sum())
