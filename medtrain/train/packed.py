"""Rows side by side without padding: what a forward pass of several rows really computes.

a padded batch (rows, length), as TRL's losses want it → its tokens as one sequence (1, tokens),
each row at positions of its own and attending to itself alone (medtrain.attention) → hidden states
→ TRL's fused output layer at the supervised positions only → what it returns, put back into
(rows, length - 1). The losses do not notice: a packed step learns exactly what a padded one does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from trl.trainer import utils as head

from medtrain.attention.packed import borders_of


def pack(attention_mask: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """Where the tokens of a padded batch lie in one sequence, for `PackedForward`.

    Args:
        attention_mask: (rows, length), 1 for tokens; padding is on the right.
        labels: (rows, length), -100 for tokens without loss.

    Returns:
        `flat`: (tokens,) places of the tokens in the flattened batch; `position_ids`: (1, tokens);
        `supervised`: (n,) places in the sequence whose next token has a loss; `scored`: (1, n)
        those next tokens; `target`: (n,) where their results go in a flattened (rows, length - 1);
        `row_lengths`: tokens of each row; `borders`: (rows + 1,) int32, where they begin and end.
    """
    length = attention_mask.shape[1]
    row_lengths = attention_mask.sum(dim=1)
    borders = torch.zeros(len(row_lengths) + 1, dtype=torch.int32)
    torch.cumsum(row_lengths, dim=0, dtype=torch.int32, out=borders[1:])
    flat = attention_mask.flatten().nonzero().squeeze(1)
    column = flat % length
    here = torch.full((attention_mask.numel(),), -1, dtype=torch.long)
    here[flat] = torch.arange(len(flat))
    with_loss = (labels.flatten() != -100) & (torch.arange(labels.numel()) % length > 0)
    scored_at = (with_loss & (attention_mask.flatten() == 1)).nonzero().squeeze(1)
    if not len(
        scored_at
    ):  # a batch without loss still takes part, with a token that does not count
        scored_at = flat[1:2]
    return {
        "flat": flat,
        "position_ids": column[None],
        "supervised": here[scored_at] - 1,
        "scored": labels.flatten()[scored_at][None],
        "target": scored_at // length * (length - 1) + scored_at % length - 1,
        "row_lengths": tuple(row_lengths.tolist()),
        "borders": borders,
    }


class PackedForward:
    """A model as TRL's losses call it, computing a packed batch where the inputs hold one."""

    def __init__(self, model: Any) -> None:
        """`model` is the trained model as it is wrapped for training."""
        self._model = model

    def __call__(self, **inputs: Any) -> Any:
        """TRL's FusedCausalLMOutput, its fields (rows, length - 1)."""
        packed = inputs.pop("packed", None)
        if packed is None:
            return self._model(**inputs)
        rows, length = inputs["input_ids"].shape
        with _every_position_scored():
            outputs = self._model(
                input_ids=inputs["input_ids"].flatten()[packed["flat"]][None],
                position_ids=packed["position_ids"],
                shift_labels=packed["scored"],
                supervised=packed["supervised"],
                use_cache=False,
                fused_lm_head=True,
                **borders_of(packed),
            )
        for name in _PER_TOKEN:
            values = getattr(outputs, name)
            if values is not None:
                whole = values.new_zeros(rows * (length - 1))
                placed = whole.index_put((packed["target"],), values[0])
                setattr(outputs, name, placed.view(rows, length - 1))
        return outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


@contextmanager
def _every_position_scored() -> Iterator[None]:
    """Keep TRL's head from looking for the positions with labels on a GPU, for which the host would
    wait: all that it gets have one, but for the only position of a batch without loss."""
    chooses = getattr(head, "_use_triton", None)
    if chooses is None:
        yield
        return
    head._use_triton = lambda device: False  # its kernels ask in a module of their own
    try:
        yield
    finally:
        head._use_triton = chooses


_PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")


def select_supervised(backbone: torch.nn.Module) -> None:
    """Let a model's body give the hidden states of the supervised positions only.

    The output layer costs as much as several layers, and prompts have no loss.
    """

    def select(module: Any, args: Any, kwargs: Mapping[str, Any], outputs: Any) -> Any:
        positions = kwargs.get("supervised")
        if positions is not None:
            outputs.last_hidden_state = outputs.last_hidden_state[:, positions]
        return outputs

    backbone.register_forward_hook(select, with_kwargs=True)
