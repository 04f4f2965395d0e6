"""What a model makes of answers: the log-probability of each, in nats.

(prompt, answer) rows of one batch → passes of similar length with a bounded number of tokens → the
model's body → the hidden states that predict answer tokens, and no others → TRL's fused output
layer, which never holds the logits of a whole pass → float64 sums. It is the arithmetic of TRL's
DPO losses, so that a policy that has learnt nothing yet agrees with its reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from trl.trainer.utils import add_fused_lm_head

TOKENS_A_PASS = 8_192
"""Of a forward pass, padding included; a row that is longer goes alone."""
_PADDING = 0
"""On the right, where no token of a row attends to it: any id will do."""


class Row(NamedTuple):
    """An answer in its place."""

    prompt_ids: Sequence[int]
    answer_ids: Sequence[int]

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt_ids) + len(self.answer_ids)


class AnswerScorer:
    """A causal language model, with or without an adapter, that tells how likely answers are."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        """Take over a model in evaluation mode.

        Args:
            model: its output layer is replaced by TRL's fused one.
            dtype: of computation; below float32 it is autocast's, as in training.
        """
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        add_fused_lm_head(causal)
        causal.base_model.register_forward_hook(self._keep_what_predicts)
        self._model, self._dtype = causal, dtype
        self._predicts: torch.Tensor | None = None

    def sums(self, rows: Sequence[Row]) -> list[float]:
        """The log-probability of each row's answer given its prompt, in nats; 0 for no answer.

        How rows are put together depends on their lengths alone. A prompt has a token at least.
        """
        found = [0.0] * len(rows)
        scored = [i for i, row in enumerate(rows) if row.answer_ids]
        for places in passes([rows[i].length for i in scored]):
            taken = [scored[place] for place in places]
            for i, nats in zip(taken, self._pass([rows[i] for i in taken]), strict=True):
                found[i] = nats
        return found

    def _pass(self, rows: Sequence[Row]) -> list[float]:
        tokens, present, predicts = _padded(rows)
        device = self._model.device
        answers = torch.tensor([token for row in rows for token in row.answer_ids])
        self._predicts = predicts.to(device)
        try:
            with (
                torch.inference_mode(),
                torch.autocast(device.type, self._dtype, enabled=self._dtype != torch.float32),
            ):
                log_probs = self._model(
                    input_ids=tokens.to(device),
                    attention_mask=present.to(device),
                    shift_labels=answers[None].to(device),  # (1, answer tokens of all rows)
                    fused_lm_head=True,
                ).log_probs
        finally:
            self._predicts = None
        by_row = log_probs[0].double().cpu().split([len(row.answer_ids) for row in rows])
        return [float(row.sum()) for row in by_row]

    def _keep_what_predicts(self, module: Any, inputs: Any, outputs: Any) -> Any:
        if self._predicts is not None:
            # (rows, length, hidden) → (1, answer tokens of all rows, hidden)
            outputs.last_hidden_state = outputs.last_hidden_state[self._predicts][None]
        return outputs


def passes(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Places of rows of similar length, whose padded tokens stay within `TOKENS_A_PASS`."""
    together: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        # The row at hand is the longest so far: all rows of its pass are padded to it.
        if together and (len(together) + 1) * lengths[place] > TOKENS_A_PASS:
            yield together
            together = []
        together.append(place)
    if together:
        yield together


def _padded(rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, where there are tokens, and where an answer token is predicted, (rows, length)."""
    longest = max(row.length for row in rows)
    tokens = torch.full((len(rows), longest), _PADDING, dtype=torch.long)
    present = torch.zeros_like(tokens)
    predicts = torch.zeros(tokens.shape, dtype=torch.bool)
    for place, row in enumerate(rows):
        tokens[place, : row.length] = torch.tensor([*row.prompt_ids, *row.answer_ids])
        present[place, : row.length] = 1
        predicts[place, len(row.prompt_ids) - 1 : row.length - 1] = True
    return tokens, present, predicts
