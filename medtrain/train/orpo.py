"""ORPO: fine-tuning on the chosen answers, and odds in their favour; there is no reference.

pairs → one forward pass of both answers → the mean log-probability of an answer's tokens → the
negative one of the chosen answer, minus `beta` times the log-sigmoid of the log of the odds ratio →
the mean over pairs (Hong, Lee and Thorne 2024, https://arxiv.org/abs/2403.07691, section 4; `beta`
is their lambda). They begin with a pretrained model, and this with the SFT adapter, whose answers
the pairs are. Tokens of the prompt have no loss, as in SFT here; in TRL's ORPOTrainer they do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import logsigmoid

from medtrain.train.evaluating import Fed
from medtrain.train.feeding import feed_preferences, pair_collate
from medtrain.train.losses.computed import Computed, mean
from medtrain.train.losses.preference import reward_figures
from medtrain.train.rows import dpo_rows
from medtrain.train.trainer_settings import PAIRED
from medtrain.train.trainers import PreferenceTrainer, answers_scored
from medtrain.train.training_stage import Method, Prepared

_CERTAIN = -1e-6
"""The greatest mean log-probability whose odds are finite numbers in float32."""


def orpo() -> Method:
    """The method."""
    return Method(dpo_rows, PAIRED, OddsRatioTrainer, _feed)


def _feed(stage: Prepared) -> Fed:
    return feed_preferences(
        stage.rows,
        stage.section,
        stage.plan,
        None,
        seed=stage.config.seed,
        collate=pair_collate(stage.chat.pad_token_id, packed=stage.packed),
        packed=stage.packed,
    )


class OddsRatioTrainer(PreferenceTrainer):
    """TRL's DPOTrainer with ORPO's loss."""

    def computed(self, model: Any, inputs: Any, items: torch.Tensor | None) -> Computed:
        """ORPO's loss; its rewards are as TRL's ORPOTrainer has them."""
        answer = inputs["completion_mask"]
        outputs = answers_scored(model, inputs)
        # (rows, length - 1) → (rows,): chosen answers, then the rejected ones
        means = outputs.log_probs.float().sum(dim=1) / answer[:, 1:].sum(dim=1)
        chosen, rejected = means.chunk(2)
        figures = {
            "nll_loss": mean(-chosen),
            "logps/chosen": mean(chosen),
            "logps/rejected": mean(rejected),
            **reward_figures(self.beta * chosen.detach(), self.beta * rejected.detach()),
        }
        loss = odds_ratio_losses(chosen, rejected, self.beta).mean()
        return Computed(loss, figures, inputs["attention_mask"].sum())


def odds_ratio_losses(chosen: torch.Tensor, rejected: torch.Tensor, beta: float) -> torch.Tensor:
    """ORPO's loss of each pair.

    Args:
        chosen: (pairs,) mean log-probability of a token of the chosen answer, in nats.
        rejected: (pairs,) the same of the rejected one.
        beta: weight of the odds ratio, the paper's λ.
    """
    log_odds_ratio = _log_odds(chosen) - _log_odds(rejected)
    return -chosen - beta * logsigmoid(log_odds_ratio)


def _log_odds(log_probability: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p))."""
    known = log_probability.clamp(max=_CERTAIN)
    return known - torch.log(-torch.expm1(known))
