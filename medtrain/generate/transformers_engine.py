"""The engine that comes with the package: transformers, on this machine's GPU or CPU.

batches of the plan → prompts that fit the model's context → a decoder (medtrain.generate.decoders)
→ texts. A batch's prompts are read together as they are handed over, so a row's neighbours are
those of the plan.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from medtrain.console import Console
from medtrain.generate.decode import Question, Row, Vocabulary
from medtrain.generate.decoders import Decoder, choose_decoder
from medtrain.generate.engine import Answer, Answered, ModelSource, Prompt
from medtrain.generate.sampling import Sampling
from medtrain.generate.shortage import release_memory, too_little_memory

if TYPE_CHECKING:
    from medtrain.data.chat import ChatTokenizer


class TransformersEngine:
    """Batched decoding; byte-identical for any cut into shards, on one kind of device."""

    def __init__(
        self,
        source: ModelSource,
        chat: ChatTokenizer,
        sampling: Sampling,
        *,
        console: Console | None = None,
        batch_size: int | Literal["auto"] = "auto",
        in_all: int | None = None,
        way: Literal["auto", "slots", "batches"] = "auto",
    ) -> None:
        """Nothing is loaded yet.

        Args:
            source: the model.
            chat: its chat format.
            sampling: how to draw.
            console: is told how answers are decoded, and of too little memory.
            batch_size: prompts answered at a time; `auto` lets a GPU's memory decide.
            in_all: prompts that the whole stage has, whichever of them are asked here.
            way: of decoding, see `choose_decoder`.
        """
        self._source, self._chat, self._sampling = source, chat, sampling
        self._console = console or Console(quiet=True)
        self._batch_size, self._in_all, self._way = batch_size, in_all, way
        self._model: Any = None
        self._decoder: Decoder | None = None
        self._vocabulary = Vocabulary(
            size=1 + max(chat.tokenizer.get_vocab().values()),
            pad=chat.pad_token_id,
            stop=frozenset(chat.stop_token_ids),
        )

    def answer(self, batches: Iterable[Sequence[Prompt]]) -> Iterator[Answered]:
        """Answer all prompts; see `Engine.answer`.

        Raises:
            MedtrainError: the device has too little memory, or the model's output is no number.
        """
        # Before the first batch is taken: a death while loading is not the fault of its rows.
        decoder = self._ready()
        refused: deque[Answered] = deque()
        try:
            for question in decoder.answer(self._units(batches, refused)):
                while refused:
                    yield refused.popleft()
                yield Answered(question.tag, tuple(self._as_answer(row) for row in question.rows))
            yield from refused
        finally:
            decoder.close()  # its memory: what comes next with this model may want it

    def close(self) -> None:
        """Drop the model and give its GPU memory back."""
        self._decoder = self._model = None
        release_memory()

    def _ready(self) -> Decoder:
        if self._decoder is None:
            self._model = self._source.load()
            try:
                self._decoder = choose_decoder(
                    self._model,
                    self._sampling,
                    self._vocabulary,
                    self._console,
                    prompts=self._batch_size,
                    in_all=self._in_all,
                    way=self._way,
                )
            except torch.OutOfMemoryError as error:
                raise too_little_memory() from error
        return self._decoder

    def _units(
        self, batches: Iterable[Sequence[Prompt]], refused: deque[Answered]
    ) -> Iterator[Sequence[Question]]:
        """Batches as questions; prompts that leave no room for an answer are refused."""
        context = context_length(self._model)
        for batch in batches:
            refused += (
                Answered.too_long(prompt, int(context))
                for prompt in batch
                if len(prompt.token_ids) >= context
            )
            yield [
                self._question(prompt, context)
                for prompt in batch
                if len(prompt.token_ids) < context
            ]

    def _question(self, prompt: Prompt, context: float) -> Question:
        # As configured, or until the model's context ends.
        limit = int(min(self._sampling.max_new_tokens, context - len(prompt.token_ids)))
        rows = [Row(seed, limit) for seed in prompt.seeds]
        return Question(prompt.token_ids, rows, tag=prompt.id)

    def _as_answer(self, row: Row) -> Answer:
        return Answer(self._chat.decode_answer(row.tokens), len(row.tokens), row.finish or "length")


def context_length(model: Any) -> float:
    """The number of positions a model was made for; infinite where it names no limit."""
    config = model.config.get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", None) or math.inf
