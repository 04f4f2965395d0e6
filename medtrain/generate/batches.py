"""Decoding batch by batch: a unit of the plan goes through `decode` whole, then the next one.

For CPUs, and for models that slots are not for. Out of memory: half as many rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch

from medtrain.console import Console
from medtrain.generate.decode import Question, Row, Vocabulary, decode
from medtrain.generate.sampling import Sampling
from medtrain.generate.shortage import release_memory, say_halved, too_little_memory


class BatchDecoder:
    """Decodes with one model."""

    def __init__(
        self, model: Any, sampling: Sampling, vocabulary: Vocabulary, console: Console
    ) -> None:
        self._model, self._sampling, self._vocabulary = model, sampling, vocabulary
        self._console = console
        self._most: int | None = None

    def answer(self, units: Iterable[Sequence[Question]]) -> Iterator[Question]:
        """Fill the rows of all questions, in their order.

        Raises:
            MedtrainError: the model's output is not a number, or one row alone needs more memory
                than there is.
        """
        for unit in units:
            while waiting := self._waiting(unit):
                self._decode(unit, waiting)
            yield from unit

    def close(self) -> None:
        """Nothing is kept."""

    def _waiting(self, unit: Sequence[Question]) -> list[tuple[int, Row]]:
        """(question, row): those that have not ended, as many as go together."""
        rows = [
            (number, row)
            for number, question in enumerate(unit)
            for row in question.rows
            if row.finish is None
        ]
        return rows[: self._most]

    def _decode(self, unit: Sequence[Question], waiting: Sequence[tuple[int, Row]]) -> None:
        together = [(i, [row for _, row in of]) for i, of in groupby(waiting, key=itemgetter(0))]
        try:
            decode(
                self._model,
                [unit[number].prompt for number, _ in together],
                [rows for _, rows in together],
                self._sampling,
                self._vocabulary,
            )
            return
        except torch.OutOfMemoryError as error:
            if len(waiting) == 1:
                raise too_little_memory() from error
        # Out here nothing holds on to what was computed last, as the error did.
        release_memory()
        self._most = len(waiting) // 2
        for _, row in waiting:
            if row.finish is None:
                row.tokens.clear()
        say_halved(self._console, len(waiting), self._most)
