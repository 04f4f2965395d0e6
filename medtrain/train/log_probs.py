"""What a model makes of answers: the log-probability of each, in nats.

rows of tokens, some of them scored → forward passes of a bounded number of tokens, packed without
padding where the model can (medtrain.train.packed), else of similar length → TRL's fused output
layer, which never holds the logits of a pass → float64 sums. It is the arithmetic of training, so
that a policy that has learnt nothing yet agrees with its reference, and a held-out loss is what a
loss in training would be.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from accelerate.utils import send_to_device
from trl.trainer.utils import add_fused_lm_head

from medtrain.train.packed import PackedForward, pack, select_supervised
from medtrain.train.rows import IGNORED

TOKENS_A_PASS = 8_192
"""Of a forward pass, padding included; a row that is longer goes alone."""
_TRIED = 24
"""Tokens of the row by which a model's fused output layer is compared with its logits."""
_PADDING = 0
"""On the right, where no token of a row attends to it: any id will do."""


class Row(NamedTuple):
    """Tokens, and which of them are scored."""

    input_ids: Sequence[int]
    scored: Sequence[bool | int]
    """A mark for every token; the first one's does not count, since nothing predicts it."""

    @classmethod
    def answering(cls, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> Row:
        """An answer in its place; a prompt has a token at least."""
        marks = [0] * len(prompt_ids) + [1] * len(answer_ids)
        return cls([*prompt_ids, *answer_ids], marks)

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.input_ids)


class Scorer(Protocol):
    """Tells how likely rows are."""

    def sums(self, rows: Sequence[Row]) -> list[float]:
        """The log-probability of each row's scored tokens, each given those before it, in nats."""


class AnswerScorer:
    """A causal language model, with or without an adapter, that tells how likely answers are."""

    def __init__(self, model: Any, dtype: torch.dtype, *, packed: bool) -> None:
        """Take over a model in evaluation mode.

        Args:
            model: gets TRL's fused output layer beside its own.
            dtype: of computation; below float32 it is autocast's, as in training.
            packed: it was loaded with an attention that keeps rows of one sequence apart.
        """
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        add_fused_lm_head(causal)
        select_supervised(causal.base_model)
        self._model, self._dtype, self._packed = causal, dtype, packed

    def sums(self, rows: Sequence[Row]) -> list[float]:
        """The log-probability of each row's scored tokens, each given those before it, in nats; 0
        for a row without any.

        How rows are put together depends on their lengths alone.
        """
        found = [0.0] * len(rows)
        scored = [i for i, row in enumerate(rows) if any(row.scored[1:])]
        for places in passes([rows[i].length for i in scored], padded=not self._packed):
            taken = [scored[place] for place in places]
            for i, nats in zip(
                taken, self._pass([rows[i] for i in taken], packed=self._packed), strict=True
            ):
                found[i] = nats
        return found

    def padded_sums(self, rows: Sequence[Row]) -> list[float]:
        """The same in one padded pass, whatever the model's attention is."""
        return self._pass(rows, packed=False)

    def _pass(self, rows: Sequence[Row], *, packed: bool) -> list[float]:
        device = self._model.device
        tokens, present, labels = _padded(rows)
        with (
            torch.inference_mode(),
            torch.autocast(device.type, self._dtype, enabled=self._dtype != torch.float32),
        ):
            if packed:
                places = send_to_device(pack(present, labels), device)
                outputs = PackedForward(self._model)(input_ids=tokens.to(device), packed=places)
            else:
                outputs = self._model(
                    input_ids=tokens.to(device),
                    attention_mask=present.to(device),
                    labels=labels.to(device),
                    fused_lm_head=True,
                )
        # (rows, length - 1), 0 where no answer token is predicted
        sums: list[float] = outputs.log_probs.double().sum(dim=1).tolist()
        return sums


class LogitScorer:
    """A causal language model by its own logits, a row at a time: for the few whose logits are more
    than their output layer's product, in a way that TRL's fused layer does not know of."""

    def __init__(self, model: Any) -> None:
        """`model` is in evaluation mode."""
        self._model = model

    @torch.inference_mode()
    def sums(self, rows: Sequence[Row]) -> list[float]:
        """As `AnswerScorer.sums`."""
        return [self._sum(row) if any(row.scored[1:]) else 0.0 for row in rows]

    def _sum(self, row: Row) -> float:
        tokens = torch.tensor([list(row.input_ids)], device=self._model.device)
        scored = torch.tensor(row.scored[1:], dtype=torch.bool, device=tokens.device)
        logits = self._model(input_ids=tokens, use_cache=False).logits[0, :-1][scored]
        wanted = tokens[0, 1:][scored]
        nats = torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="none")
        return -float(nats.double().sum())


def scorer_of(model: Any, *, packed: bool) -> Scorer:
    """The scorer of any causal language model: the fused one, if a short row is as likely by it as
    by the model's own logits.

    Args:
        model: in evaluation mode, without an adapter, its attention as transformers loads it.
        packed: whether rows may lie in one sequence.
    """
    vocabulary = model.config.get_text_config().vocab_size
    row = Row([(7 * i + 3) % vocabulary for i in range(_TRIED)], [1] * _TRIED)
    own = LogitScorer(model)
    expected = own.sums([row])[0]
    try:
        fused = AnswerScorer(model, model.dtype, packed=packed)
        found = fused.padded_sums([row])[0]
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return own  # a model of another build than TRL's layer is made for
    allowed = _TRIED * (0.05 if model.dtype.itemsize == 2 else 1e-5)
    return fused if abs(found - expected) <= allowed else own


def passes(lengths: Sequence[int], *, padded: bool) -> Iterator[list[int]]:
    """Places of rows of similar length that take at most `TOKENS_A_PASS` tokens together.

    Args:
        lengths: tokens of each row.
        padded: whether a row takes as many as the longest one of its pass.
    """
    together: list[int] = []
    taken = 0
    for place in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        # The row at hand is the longest so far.
        wanted = (len(together) + 1) * lengths[place] if padded else taken + lengths[place]
        if together and wanted > TOKENS_A_PASS:
            yield together
            together, wanted = [], lengths[place]
        together.append(place)
        taken = wanted
    if together:
        yield together


def _padded(rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, where there are tokens, and the scored ones' as labels; all (rows, length)."""
    longest = max(row.length for row in rows)
    tokens = torch.full((len(rows), longest), _PADDING, dtype=torch.long)
    present = torch.zeros_like(tokens)
    labels = torch.full_like(tokens, IGNORED)
    for place, row in enumerate(rows):
        ids = torch.tensor(row.input_ids)
        tokens[place, : row.length] = ids
        present[place, : row.length] = 1
        marks = torch.tensor(row.scored, dtype=torch.bool)
        labels[place, : row.length] = ids.masked_fill(~marks, IGNORED)
    return tokens, present, labels
