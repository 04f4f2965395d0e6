"""The engine that comes with the package: transformers, on this machine's GPU or CPU.

prompts that fit the model's context → one batch at a time through `decode` → texts. Batches are
computed as they are handed over, so a row's neighbours are those of the plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from medtrain.errors import MedtrainError
from medtrain.generate.decode import Row, Vocabulary, decode
from medtrain.generate.engine import Answer, Answered, ModelSource, Prompt
from medtrain.generate.sampling import Sampling

if TYPE_CHECKING:
    from medtrain.data.chat import ChatTokenizer


class TransformersEngine:
    """Batched decoding; byte-identical for any cut into shards, on one kind of device."""

    def __init__(self, source: ModelSource, chat: ChatTokenizer, sampling: Sampling) -> None:
        self._source, self._chat, self._sampling = source, chat, sampling
        self._model: Any = None
        self._vocabulary = Vocabulary(
            size=1 + max(chat.tokenizer.get_vocab().values()),
            pad=chat.pad_token_id,
            stop=frozenset(chat.stop_token_ids),
        )

    def answer(self, batches: Iterable[Sequence[Prompt]]) -> Iterator[Answered]:
        """Answer batch by batch; see `Engine.answer`.

        Raises:
            MedtrainError: the device has too little memory, or the model's output is no number.
        """
        # Before the first batch is taken: a death while loading is not the fault of its rows.
        if self._model is None:
            self._model = self._source.load()
        for batch in batches:
            context = context_length(self._model)
            fitting = [prompt for prompt in batch if len(prompt.token_ids) < context]
            for prompt in batch:
                if len(prompt.token_ids) >= context:
                    yield Answered.too_long(prompt, int(context))
            if fitting:
                yield from self._decode(fitting, context)

    def close(self) -> None:
        """Drop the model and give its GPU memory back."""
        self._model = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _decode(self, batch: Sequence[Prompt], context: float) -> Iterator[Answered]:
        rows = [
            [Row(seed, self._limit(prompt, context)) for seed in prompt.seeds] for prompt in batch
        ]
        try:
            decode(
                self._model,
                [prompt.token_ids for prompt in batch],
                rows,
                self._sampling,
                self._vocabulary,
            )
        except torch.OutOfMemoryError as error:
            raise MedtrainError(
                f"Too little GPU memory to answer {len(batch)} prompts at a time",
                fix="Lower batch_size of this stage (`generate:` or `evaluate:`); finished rows "
                "are kept.",
            ) from error
        for prompt, samples in zip(batch, rows, strict=True):
            yield Answered(prompt.id, tuple(self._as_answer(row) for row in samples))

    def _as_answer(self, row: Row) -> Answer:
        return Answer(self._chat.decode_answer(row.tokens), len(row.tokens), row.finish or "length")

    def _limit(self, prompt: Prompt, context: float) -> int:
        """Tokens that an answer can have: as configured, or until the model's context ends."""
        return int(min(self._sampling.max_new_tokens, context - len(prompt.token_ids)))


def context_length(model: Any) -> float:
    """The number of positions a model was made for; infinite where it names no limit."""
    config = model.config.get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", None) or math.inf
