"""Fine-tuning's loss: the negative log-likelihood of a token of the answers.

log-probabilities of supervised tokens → their negative sum over the tokens of the whole step, of
all processes; that is TRL's `nll`. Data-parallel training divides gradients by the processes, so
the sum is multiplied by them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from medtrain.train.losses.computed import Computed, Ratio


def supervised(
    outputs: Any, inputs: Mapping[str, Any], items: Tensor | None, processes: int
) -> Computed:
    """The loss of a forward pass.

    Args:
        outputs: of TRL's fused head, with `log_probs`, `entropy`, `is_top1` and `label_mask`, each
            (rows, length - 1) and 0 where no token is supervised.
        inputs: of the pass, with `attention_mask`.
        items: () supervised tokens of the step in all processes; None takes those of the pass, and
            makes the loss a plain mean.
        processes: that train together.
    """
    counted = outputs.label_mask.sum()
    loss = (-outputs.log_probs).sum() / (counted if items is None else items).clamp(min=1)
    if items is not None:
        loss = loss * processes
    figures = {
        "entropy": Ratio(outputs.entropy.detach().sum(), counted),
        "mean_token_accuracy": Ratio(outputs.is_top1.sum(), counted),
    }
    return Computed(loss, figures, inputs["attention_mask"].sum())
