"""KTO's mismatched pairs: every prompt with the answers to another one.

KTO weighs an answer by how far the trained model has moved from its reference on answers that are
beside the point: a KL divergence, estimated on prompts with answers of others
(https://arxiv.org/abs/2402.01306, section 4.1). pairs of token ids → a partner for each, of another
prompt, the same one in the reference and in training → its answers after this prompt.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from medtrain.errors import DataError

_SUFFIX = ":mismatched"


class Answered(NamedTuple):
    """Token ids of a prompt and of two answers."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


def mismatched_id(row_id: str) -> str:
    """The id of a pair's prompt with its partner's answers."""
    return row_id + _SUFFIX


def is_mismatched(row_id: str) -> bool:
    """Whether `mismatched_id` made it."""
    return row_id.endswith(_SUFFIX)


def mismatched(pairs: Sequence[Answered], max_length: int) -> list[Answered]:
    """Every pair's prompt with its partner's answers, cut where a row would be longer.

    Args:
        pairs: usable ones, whose prompts are shorter than `max_length`.
        max_length: tokens of a prompt and an answer together.

    Raises:
        DataError: all pairs have one prompt.
    """
    found = []
    for pair, other in zip(pairs, partners([p.prompt_ids for p in pairs]), strict=True):
        room = max_length - len(pair.prompt_ids)
        answers = pairs[other]
        found.append(
            Answered(pair.prompt_ids, answers.chosen_ids[:room], answers.rejected_ids[:room])
        )
    return found


def partners(prompts: Sequence[Sequence[int]]) -> list[int]:
    """For every row the place of one with another prompt; chosen by the prompts alone.

    Every row is somebody's partner, as in the estimate that KTO's authors give, unless more than
    half of the rows have the same prompt.

    Raises:
        DataError: all rows have one prompt.
    """
    names = [hashlib.sha256(repr(list(prompt)).encode()).digest() for prompt in prompts]
    most = max(Counter(names).values(), default=0)
    count = len(names)
    if count and most == count:
        raise DataError(
            "KTO needs preference pairs of two prompts at least, and these have one",
            fix="Use more prompts (data.preference_fraction), or dpo.method=dpo.",
        )
    # Rows of one prompt lie together here, so that as many places on there is another prompt.
    order = sorted(range(count), key=lambda row: (names[row], row))
    found = [0] * count
    for place, row in enumerate(order):
        later = (order[(place + most + step) % count] for step in range(count))
        found[row] = next(other for other in later if names[other] != names[row])
    return found
