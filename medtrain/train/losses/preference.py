"""The losses of pairs: how much likelier the chosen answer has become than the rejected one.

log π(y|x) - log π_ref(y|x) of both answers → one of the published formulas, by TRL's names → the
mean over pairs. All begin with direct preference optimisation (Rafailov et al. 2023,
https://arxiv.org/abs/2305.18290), whose β holds the model to its reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from medtrain.train.losses.computed import Computed, mean, token_mean


class Pairs(NamedTuple):
    """What the formulas are about, (pairs,) each."""

    chosen: Tensor
    """log π - log π_ref of the chosen answer, in nats."""
    rejected: Tensor
    chosen_tokens: Tensor
    """Of the answer."""
    rejected_tokens: Tensor

    @property
    def margin(self) -> Tensor:
        """How much more the chosen answer has gained."""
        return self.chosen - self.rejected

    @property
    def margin_a_token(self) -> Tensor:
        """The same of the means over their tokens."""
        return self.chosen / self.chosen_tokens.clamp(min=1.0) - (
            self.rejected / self.rejected_tokens.clamp(min=1.0)
        )


class Settings(NamedTuple):
    """What the formulas depend on besides."""

    beta: float
    label_smoothing: float = 0.0
    """Share of pairs that are the wrong way round; of `robust`."""
    tau: float = 0.05
    """Temperature of `discopop`."""


Formula = Callable[[Pairs, Settings], Tensor]


def _sigmoid(pairs: Pairs, with_: Settings) -> Tensor:
    """Rafailov et al. 2023, equation 7."""
    return -logsigmoid(with_.beta * pairs.margin)


def _sigmoid_norm(pairs: Pairs, with_: Settings) -> Tensor:
    """The same of means over tokens: Lambert et al. 2024, https://arxiv.org/abs/2411.15124."""
    return -logsigmoid(with_.beta * pairs.margin_a_token)


def _hinge(pairs: Pairs, with_: Settings) -> Tensor:
    """Zhao et al. 2023, https://arxiv.org/abs/2305.10425, with the reference of DPO."""
    return torch.relu(1 - with_.beta * pairs.margin)


def _ipo(pairs: Pairs, with_: Settings) -> Tensor:
    """Azar et al. 2023, https://arxiv.org/abs/2310.12036, equation 17; over tokens, as TRL has."""
    return (pairs.margin_a_token - 1 / (2 * with_.beta)) ** 2


def _robust(pairs: Pairs, with_: Settings) -> Tensor:
    """Chowdhury et al. 2024, https://arxiv.org/abs/2403.00409, equation 12."""
    flipped = with_.label_smoothing
    as_they_are = -(1 - flipped) * logsigmoid(with_.beta * pairs.margin)
    the_other_way = -flipped * logsigmoid(-with_.beta * pairs.margin)
    return (as_they_are - the_other_way) / (1 - 2 * flipped)


def _nca_pair(pairs: Pairs, with_: Settings) -> Tensor:
    """Chen et al. 2024, https://arxiv.org/abs/2402.05369."""
    chosen, rejected = with_.beta * pairs.chosen, with_.beta * pairs.rejected
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def _bco_pair(pairs: Pairs, with_: Settings) -> Tensor:
    """Jung et al. 2024, https://arxiv.org/abs/2404.04656, without its shift."""
    return -logsigmoid(with_.beta * pairs.chosen) - logsigmoid(-(with_.beta * pairs.rejected))


def _sppo_hard(pairs: Pairs, with_: Settings) -> Tensor:
    """Wu et al. 2024, https://arxiv.org/abs/2405.00675, equation 4.7; the chosen one always wins"""
    half = 0.5 / with_.beta
    return (pairs.chosen - half) ** 2 + (pairs.rejected + half) ** 2


def _apo_zero(pairs: Pairs, with_: Settings) -> Tensor:
    """D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266, equation 7."""
    return (1 - torch.sigmoid(with_.beta * pairs.chosen)) + torch.sigmoid(
        with_.beta * pairs.rejected
    )


def _apo_down(pairs: Pairs, with_: Settings) -> Tensor:
    """D'Oosterlinck et al. 2024, equation 8."""
    return torch.sigmoid(with_.beta * pairs.chosen) + (1 - torch.sigmoid(with_.beta * pairs.margin))


def _discopop(pairs: Pairs, with_: Settings) -> Tensor:
    """Lu et al. 2024, https://arxiv.org/abs/2406.08414, equation 5."""
    logits = pairs.margin * with_.beta
    share = torch.sigmoid(logits / with_.tau)
    return -logsigmoid(logits) * (1 - share) + torch.exp(-logits) * share


FORMULAS: Mapping[str, Formula] = {
    "sigmoid": _sigmoid,
    "sigmoid_norm": _sigmoid_norm,
    "hinge": _hinge,
    "ipo": _ipo,
    "robust": _robust,
    "nca_pair": _nca_pair,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
}
"""By the names of `dpo.loss_type`; each gives (pairs,) losses."""


def preference(
    outputs: Any,
    inputs: Mapping[str, Any],
    loss_type: str,
    settings: Settings,
) -> Computed:
    """The loss of a forward pass of chosen answers, then the rejected ones.

    Args:
        outputs: of TRL's fused head, (rows, length - 1), 0 outside answers.
        inputs: of the pass: `completion_mask` and `attention_mask`, (rows, length), and the
            reference's sums of both answers, (pairs,).
        loss_type: one of `FORMULAS`.
        settings: of the formula.
    """
    answer = inputs["completion_mask"]
    chosen, rejected = outputs.log_probs.sum(dim=1).chunk(2)
    tokens = answer.sum(dim=1)
    pairs = Pairs(
        chosen - inputs["ref_chosen_logps"],
        rejected - inputs["ref_rejected_logps"],
        *tokens.chunk(2),
    )
    loss = FORMULAS[loss_type](pairs, settings).mean()
    rewards = settings.beta * pairs.chosen.detach(), settings.beta * pairs.rejected.detach()
    figures = {
        "entropy": token_mean(outputs.entropy, answer[:, 1:]),
        **answer_figures(outputs, answer),
        "mean_token_accuracy": token_mean(*(each.chunk(2)[0] for each in (outputs.is_top1,
                                                                          answer[:, 1:]))),
        **reward_figures(*rewards),
        "logps/chosen": mean(chosen),
        "logps/rejected": mean(rejected),
    }  # fmt: skip
    return Computed(loss, figures, inputs["attention_mask"].sum())


def answer_figures(outputs: Any, answer: Tensor) -> dict[str, Any]:
    """The mean logit of a token of either answer; `answer` is its mask, (rows, length)."""
    sides = zip(outputs.mean_logits.chunk(2), answer[:, 1:].chunk(2), strict=True)
    names = ("logits/chosen", "logits/rejected")
    return {name: token_mean(*side) for name, side in zip(names, sides, strict=True)}


def reward_figures(chosen: Tensor, rejected: Tensor) -> dict[str, Any]:
    """What is logged of (pairs,) rewards."""
    return {
        "rewards/chosen": mean(chosen),
        "rewards/rejected": mean(rejected),
        "rewards/accuracies": mean((chosen > rejected).float()),
        "rewards/margins": mean(chosen - rejected),
    }
