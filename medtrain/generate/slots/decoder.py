"""Units of prompts through slots: finished rows go, waiting ones take their places.

free slots → the next unit is taken, read at once, and its samples wait → into slots → a few steps →
the host looks which rows ended → answered questions are handed over while the next steps run. A
unit is taken only when a slot is free for it, so that little is in flight. Slots of another length
are made when all rows of the length before have ended: a row's neighbours never decide how long its
slot is. Out of memory: half the slots, and rows that had not ended begin again; their seeds are
theirs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from medtrain.console import Console
from medtrain.generate.decode import Question, Row, Vocabulary, not_a_number
from medtrain.generate.forward import Forward
from medtrain.generate.sampling import Sampling, uniforms
from medtrain.generate.shortage import release_memory, say_halved, too_little_memory
from medtrain.generate.slots.cache import CacheShape, SlotCache
from medtrain.generate.slots.prompts import Group, read
from medtrain.generate.slots.recorded import Run, recorded
from medtrain.generate.slots.sizes import READ_TOKENS, slot_length
from medtrain.generate.slots.stepper import BROKEN, FINISHES, Entry, Stepper

LOOK_EVERY = 8
"""Steps until the host looks which rows have ended: each look makes the device wait."""

Unit = Sequence[Question]


@dataclass(slots=True)
class _Slots:
    """Slots of one length."""

    length: int
    stepper: Stepper
    run: Run


@dataclass(slots=True)
class _Work:
    """What one call of `answer` has in hand."""

    units: Iterator[Unit]
    begun: list[Unit] = field(default_factory=list)
    """Units with rows that have not ended."""
    groups: deque[Group] = field(default_factory=deque)
    """To be put into slots, the first one first."""
    busy: dict[int, tuple[Question, Row]] = field(default_factory=dict)
    """By slot."""
    left: dict[int, int] = field(default_factory=dict)
    """By slot: steps after which its row has surely ended."""
    answered: deque[Question] = field(default_factory=deque)
    """Not handed over yet."""


class SlotDecoder:
    """Decodes with one model; slots stay from one call to the next."""

    def __init__(
        self,
        model: Any,
        sampling: Sampling,
        vocabulary: Vocabulary,
        *,
        shape: CacheShape,
        number: Callable[[int], int],
        console: Console,
    ) -> None:
        """Nothing is reserved yet.

        Args:
            model: one that slots are for (medtrain.generate.slots.fitting).
            sampling: how to draw.
            vocabulary: stop, pad, size.
            shape: what the model keeps of a token.
            number: how many slots of a length there are to be, at least 1.
            console: is told of the slots, and of too little memory.
        """
        self._model, self._forward = model, Forward(model)
        self._sampling, self._vocabulary = sampling, vocabulary
        self._shape, self._wanted = shape, number
        self._most: int | None = None
        self._tried = 0
        self._console, self._told = console, False
        self._slots: _Slots | None = None

    def answer(self, units: Iterable[Unit]) -> Iterator[Question]:
        """Fill the rows of all questions; each is handed over when its last row has ended.

        Raises:
            MedtrainError: the model's output is not a number, or one row alone needs more memory
                than there is.
        """
        work = _Work(iter(units))
        while True:
            try:
                yield from self._answer(work)
                return
            except torch.OutOfMemoryError as error:
                if self._tried <= 1:
                    raise too_little_memory() from error
            # Out here nothing holds on to what was computed last, as the error did.
            self._halve(work)

    def close(self) -> None:
        """Give the slots' memory back."""
        self._slots = None
        release_memory()

    def _answer(self, work: _Work) -> Iterator[Question]:
        while True:
            self._fill(work)
            if work.busy:
                self._advance(work)
            # Handed over while the device works on what was just begun.
            while work.answered:
                yield work.answered.popleft()
            if not work.busy:
                return
            self._take_ended(work)

    @torch.no_grad()
    def _fill(self, work: _Work) -> None:
        """Put waiting rows into free slots, taking units as they are needed."""
        while self._slots is None or len(work.busy) < self._slots.stepper.slots:
            group = self._next_group(work)
            if group is None:
                return
            if self._slots is None or self._slots.length != group.length:
                if work.busy:
                    return
                self._make_slots(group.length)
            self._put(group, work)
            if not group.waiting:
                work.groups.popleft()

    def _next_group(self, work: _Work) -> Group | None:
        while not work.groups:
            unit = next(work.units, None)
            if unit is None:
                return None
            if unit:
                work.begun.append(unit)
                work.groups += self._groups(unit)
        return work.groups[0]

    def _groups(self, unit: Unit) -> Iterator[Group]:
        """A unit's questions in the portions in which they are read."""
        length = slot_length(max(question.positions for question in unit))
        longest = max(len(question.prompt) for question in unit)
        together = max(1, min(READ_TOKENS // longest, self._number(length)))
        for first in range(0, len(unit), together):
            group = Group(unit[first : first + together], length)
            if group.waiting:
                yield group

    def _number(self, length: int) -> int:
        """Of slots of a length."""
        wanted = self._wanted(length)
        return wanted if self._most is None else min(wanted, self._most)

    def _make_slots(self, length: int) -> None:
        self._slots = None  # before the new ones are made: they need the room
        self._tried = self._number(length)
        cache = SlotCache(self._shape, self._tried, length)
        stop = self._vocabulary.stop
        stepper = Stepper(self._forward, cache, self._sampling, self._vocabulary.size, stop)
        self._slots = _Slots(length, stepper, run := recorded(stepper))
        self._tell(run)

    def _put(self, group: Group, work: _Work) -> None:
        """Put a group's rows into the free slots, as many as there are."""
        assert self._slots is not None
        stepper = self._slots.stepper
        if group.cache is None:
            prompts = [question.prompt for question in group.questions]
            group.cache = read(self._forward, prompts, self._vocabulary.pad)
        free = [slot for slot in range(stepper.slots) if slot not in work.busy]
        rows = [group.waiting.popleft() for _ in free[: len(group.waiting)]]
        free = free[: len(rows)]
        entries = [self._entry(number, group.questions[number], row) for number, row in rows]
        stepper.enter(group.cache, entries, free)
        for slot, (number, row) in zip(free, rows, strict=True):
            work.busy[slot] = (group.questions[number], row)
            work.left[slot] = row.max_tokens

    def _entry(self, number: int, question: Question, row: Row) -> Entry:
        count = 0 if self._sampling.greedy else row.max_tokens
        prompt = question.prompt
        return Entry(number, prompt[-1], len(prompt), row.max_tokens, uniforms(row.seed, count))

    @torch.no_grad()
    def _advance(self, work: _Work) -> None:
        """A few steps, but none when the last row must have ended."""
        assert self._slots is not None
        steps = min(LOOK_EVERY, max(work.left.values()))
        for _ in range(steps):
            self._slots.run()
        for slot in work.left:
            work.left[slot] = max(1, work.left[slot] - steps)

    @torch.no_grad()
    def _take_ended(self, work: _Work) -> None:
        """Take the rows that have ended since the last look, and note what they answer."""
        assert self._slots is not None
        for slot, status, tokens in self._slots.stepper.look(list(work.busy)):
            question, row = work.busy.pop(slot)
            del work.left[slot]
            if status == BROKEN:
                raise not_a_number(self._model)
            row.tokens, row.finish = tokens, FINISHES[status]
            if question.is_answered:
                work.answered.append(question)
        if work.answered:
            work.begun = [unit for unit in work.begun if not all(q.is_answered for q in unit)]

    def _halve(self, work: _Work) -> None:
        """Half the slots, and all rows that have not ended once more."""
        self._slots, self._most = None, self._tried // 2
        work.busy.clear()
        work.left.clear()
        work.groups.clear()
        release_memory()
        for unit in work.begun:
            work.groups += self._groups(unit)
        say_halved(self._console, self._tried, self._most)

    def _tell(self, run: Run) -> None:
        assert self._slots is not None
        how = "with a CUDA graph" if run.why_not_recorded is None else "step by step"
        size = f"{self._slots.stepper.slots} rows x {self._slots.length} positions"
        tell = self._console.log_only if self._told else self._console.event
        tell("decoding", message=f"decoding: slots {how}, {size}")
        if run.why_not_recorded is not None and not self._told and torch.cuda.is_available():
            self._console.warn(
                "decoding_not_recorded",
                f"A decoding step cannot be recorded as a CUDA graph, so answers take longer: "
                f"{run.why_not_recorded}",
            )
        self._told = True
