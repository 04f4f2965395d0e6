"""KTO's loss: each answer by itself is to be given, or not.

log π - log π_ref of every answer, and how far the model has moved on the whole (KL) → a desirable
answer's 1 - sigmoid(β (ratio - KL)), an undesirable one's 1 - sigmoid(β (KL - ratio)), weighted →
the mean over answers (Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306, equation 7).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from medtrain.train.losses.computed import Computed, Ratio, mean, token_mean
from medtrain.train.losses.preference import answer_figures


class Weights(NamedTuple):
    """What the formula depends on besides."""

    beta: float
    desirable: float = 1.0
    undesirable: float = 1.0


def unpaired(
    outputs: Any, inputs: Mapping[str, Any], divergence: Tensor, weights: Weights
) -> Computed:
    """The loss of a forward pass of desirable answers, then as many undesirable ones.

    Args:
        outputs: of TRL's fused head, (rows, length - 1), 0 outside answers.
        inputs: of the pass: `completion_mask` and `attention_mask`, (rows, length), and
            `ref_logps`, (rows,).
        divergence: (1,) estimate of the KL divergence in nats; a negative one counts as 0.
        weights: of both kinds of answers.
    """
    answer, beta = inputs["completion_mask"], weights.beta
    chosen, rejected = outputs.log_probs.sum(-1).chunk(2)
    known_chosen, known_rejected = inputs["ref_logps"].chunk(2)
    moved = divergence.detach().mean().clamp(min=0)
    chosen_ratio, rejected_ratio = chosen - known_chosen, rejected - known_rejected
    losses = torch.cat([
        weights.desirable * (1 - torch.sigmoid(beta * (chosen_ratio - moved))),
        weights.undesirable * (1 - torch.sigmoid(beta * (moved - rejected_ratio))),
    ])  # fmt: skip
    rewards = beta * chosen_ratio.detach(), beta * rejected_ratio.detach()
    figures = {
        "kl": Ratio(moved, 1.0),
        "entropy": token_mean(outputs.entropy, answer[:, 1:]),
        **answer_figures(outputs, answer),
        "rewards/chosen": mean(rewards[0]),
        "logps/chosen": mean(chosen),
        "rewards/rejected": mean(rewards[1]),
        "logps/rejected": mean(rejected),
        "rewards/margins": mean(rewards[0] - rewards[1]),
    }
    return Computed(losses.mean(), figures, inputs["attention_mask"].sum())
