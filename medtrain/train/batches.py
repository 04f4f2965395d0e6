"""Which rows every optimiser step has, and which process computes them in which forward pass.

seed and epoch → one order of all rows → steps of `rows_a_step` rows: up to here the number of
processes does not matter → the rows of a step dealt to processes and forward passes, by length, so
that none takes more tokens than allowed, all have about as many, and there are as few as possible.
Every process computes the same plan, so nobody has to be told anything.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

Dealt = list[list[list[int]]]
"""Rows by process and forward pass: `dealt[process][forward]` is a list of row numbers."""


@dataclass(frozen=True)
class BatchPlan:
    """The steps of a training."""

    lengths: Sequence[int]
    """Tokens of every row; of a pair, those of both sides."""
    rows_a_step: int
    processes: int
    max_rows: int
    """Rows of a forward pass where tokens are not counted."""
    max_tokens: int | None
    """Tokens of a forward pass; None where `max_rows` counts, because rows are padded."""
    seed: int
    even: bool = False
    """Every forward pass of a step has as many rows, and the last step of an epoch is filled up
    with rows from the epoch's beginning: for losses that are means over rows."""

    @property
    def steps_per_epoch(self) -> int:
        """The last step may have fewer rows than the others."""
        return max(1, ceil(len(self.lengths) / self.rows_a_step))

    def rows_of(self, epoch: int, step: int) -> list[int]:
        """The rows of a step of an epoch, both counted from 0; the same for any `processes`."""
        order = self.order(epoch)
        rows = order[step * self.rows_a_step : (step + 1) * self.rows_a_step]
        if self.even:
            rows += [order[i % len(order)] for i in range(self.rows_a_step - len(rows))]
        return rows

    def order(self, epoch: int) -> list[int]:
        """All rows as an epoch takes them."""
        order = list(range(len(self.lengths)))
        random.Random(f"medtrain:{self.seed}:{epoch}").shuffle(order)
        return order

    def deal(self, rows: Sequence[int]) -> Dealt:
        """Deal the rows of a step; every process gets as many forward passes.

        Where `even` is not set some of them may be empty: all of a process's only where there are
        fewer rows than processes.
        """
        if self.even:
            forwards = self._deal_even(rows)
        elif self.max_tokens is None:
            forwards = self._deal_padded(rows)
        else:
            forwards = self._deal_packed(rows, self.max_tokens)
        return [[forward[process] for forward in forwards] for process in range(self.processes)]

    def shared_and_alone(self, rows: Sequence[int]) -> tuple[list[int], list[int]]:
        """The rows that can be dealt evenly, and the few that cannot: the shortest."""
        sorted_rows = self._longest_first(rows)
        even = len(rows) // self.processes * self.processes
        return sorted_rows[:even], sorted_rows[even:]

    def _deal_padded(self, rows: Sequence[int]) -> list[list[list[int]]]:
        """Neighbours in length together: a row is padded to the longest of its forward pass."""
        at_once = self.max_rows * self.processes
        sorted_rows = self._longest_first(rows)
        return [
            [sorted_rows[start : start + at_once][p :: self.processes]
             for p in range(self.processes)]
            for start in range(0, len(sorted_rows), at_once)
        ]  # fmt: skip

    def _deal_even(self, rows: Sequence[int]) -> list[list[list[int]]]:
        """As few forward passes of equal numbers of rows as the tokens allow."""
        each = len(rows) // self.processes
        sorted_rows = self._longest_first(rows)
        for size in sorted((s for s in range(1, each + 1) if each % s == 0), reverse=True):
            at_once = size * self.processes
            forwards = [
                _snake(sorted_rows[start : start + at_once], self.processes)
                for start in range(0, len(sorted_rows), at_once)
            ]
            fits = size <= self.max_rows if self.max_tokens is None else self._fits(forwards)
            if fits or size == 1:
                return forwards
        raise ValueError(f"{len(rows)} rows cannot be dealt to {self.processes} processes evenly")

    def _fits(self, forwards: list[list[list[int]]]) -> bool:
        assert self.max_tokens is not None
        return all(self._tokens(rows) <= self.max_tokens for each in forwards for rows in each)

    def _deal_packed(self, rows: Sequence[int], limit: int) -> list[list[list[int]]]:
        """As few forward passes as hold the tokens, then evened out if they still fit."""
        bins = self._best_fit(rows, limit)
        count = ceil(len(bins) / self.processes) * self.processes
        level = self._evened_out(rows, count)
        if max(self._tokens(each) for each in level) <= limit:
            bins = level
        bins += [[] for _ in range(count - len(bins))]
        bins.sort(key=self._tokens, reverse=True)
        return [bins[start : start + self.processes] for start in range(0, count, self.processes)]

    def _best_fit(self, rows: Sequence[int], limit: int) -> list[list[int]]:
        """Best-fit decreasing: the longest row first, into the fullest bin that has room."""
        bins: list[list[int]] = []
        room: list[int] = []
        for row in self._longest_first(rows):
            length = self.lengths[row]
            open_bins = [i for i, left in enumerate(room) if left >= length]
            if open_bins:
                best = min(open_bins, key=lambda i: room[i])
                bins[best].append(row)
                room[best] -= length
            else:
                bins.append([row])
                room.append(limit - length)
        return bins

    def _evened_out(self, rows: Sequence[int], count: int) -> list[list[int]]:
        """The longest row first, into the emptiest bin."""
        bins: list[list[int]] = [[] for _ in range(count)]
        tokens = [0] * count
        for row in self._longest_first(rows):
            emptiest = tokens.index(min(tokens))
            bins[emptiest].append(row)
            tokens[emptiest] += self.lengths[row]
        return bins

    def _longest_first(self, rows: Sequence[int]) -> list[int]:
        return sorted(rows, key=lambda row: (-self.lengths[row], row))

    def _tokens(self, rows: Sequence[int]) -> int:
        return sum(self.lengths[row] for row in rows)


def _snake(rows: Sequence[int], hands: int) -> list[list[int]]:
    """Deal sorted rows to and fro, so that nobody gets the longer one every time."""
    dealt: list[list[int]] = [[] for _ in range(hands)]
    for place, row in enumerate(rows):
        turn, hand = divmod(place, hands)
        dealt[hand if turn % 2 == 0 else hands - 1 - hand].append(row)
    return dealt
