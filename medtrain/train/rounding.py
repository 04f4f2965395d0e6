"""How far two sums of log-probabilities of one answer may be apart though one model made both.

A policy that has learnt nothing and its reference are one model, but their rows lie in different
forward passes, and a GPU adds up a product in another order when its shape is another. In 16 bits
that turns the last bit of some activations and logits; the log-probabilities of tokens are kept and
summed in float32, so nothing else is lost. Rounding errors of tokens and of layers are independent
of each other: their sum grows with the square root of both.

Measured on a CPU, where the order of additions does not depend on the pass and sums are the same
to the bit: each product disturbed by 2^-11 of its value, answers of up to 700 tokens lay at most
2.3 eps sqrt(tokens layers) nats apart for each nat that a token's log-probability has (a trained
model of 6 layers), and 0.03 of it with random weights; bfloat16 lay at most 1.7 of it from float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_TIMES = 4.0
_FLOAT32_RELATIVE = 1e-5
"""Of a sum: 4-bit kernels of CPUs compute in less than float32."""
FAR = 2.5
"""Bounds that no rounding explains: another model."""

PairLosses = Callable[[Tensor, Tensor], Tensor]
"""Losses of pairs from how much likelier both answers have become, (pairs,) each."""


class FirstLoss(NamedTuple):
    """The loss before the first step."""

    found: float
    expected: float
    """Where policy and reference agree."""
    allowed: float
    """How far rounding may take it from there."""

    @property
    def is_explained(self) -> bool:
        """Whether rounding explains it; no number is never explained."""
        return abs(self.found - self.expected) <= self.allowed


def rounding_of_sums(nats: Tensor, tokens: Tensor, layers: int, dtype: torch.dtype) -> Tensor:
    """How many nats two sums of an answer may be apart, (answers,).

    Args:
        nats: (answers,) log-probabilities.
        tokens: (answers,) that were summed up.
        layers: of the model.
        dtype: that it computes in.
    """
    tokens = tokens.clamp(min=1)
    scale = (nats.abs() / tokens).clamp(min=1.0)
    bound = _TIMES * torch.finfo(dtype).eps * (tokens * layers).sqrt() * scale
    if dtype == torch.float32:
        return torch.maximum(bound, _FLOAT32_RELATIVE * nats.abs().clamp(min=1.0))
    return bound


def first_loss(losses: PairLosses, gaps: Tensor, bounds: Tensor) -> FirstLoss:
    """The mean loss of pairs before a step, and how far from its value it may be.

    Args:
        losses: the formula.
        gaps: (2, pairs) policy minus reference, of chosen and of rejected answers.
        bounds: (2, pairs) how large these may be. They are independent, and so are pairs: what they
            do to the mean of losses shrinks with the root of their number, but for the curvature.
    """
    zero = torch.zeros_like(gaps[0])
    expected = losses(zero, zero)
    corners = torch.stack([
        losses(up * bounds[0], down * bounds[1]) - expected for up in (-1, 1) for down in (-1, 1)
    ])  # fmt: skip
    count = gaps.shape[1]
    spread = corners.abs().amax(dim=0).square().sum().sqrt() / count
    curved = corners.mean(dim=0).abs().sum() / count
    found = losses(gaps[0], gaps[1]).mean()
    return FirstLoss(float(found), float(expected.mean()), float(spread + curved))
