"""Prompts on their way into slots: who waits, and the pass that reads them.

Prompts of one unit are read together, so that what a prompt's keys and values are depends on the
plan and on nothing else; the samples of a prompt share its reading.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from medtrain.attention.kernels import takes_groups
from medtrain.generate.decode import Question, Row
from medtrain.generate.forward import Forward
from medtrain.generate.slots.cache import PromptCache, windows_of


@dataclass(slots=True)
class Group:
    """Questions that are read together, and which of their rows still wait for a slot."""

    questions: Sequence[Question]
    length: int
    """Of the slots they go to: their unit's."""
    cache: PromptCache | None = None
    """Once they are read."""
    waiting: deque[tuple[int, Row]] = field(default_factory=deque)
    """(question, row), those that have not ended."""

    def __post_init__(self) -> None:
        for number, question in enumerate(self.questions):
            self.waiting += ((number, row) for row in question.rows if row.finish is None)


@torch.no_grad()
def read(forward: Forward, prompts: Sequence[Sequence[int]], pad: int) -> PromptCache:
    """Run prompts, padded on the right: keys and values of all of them, (prompts, …, longest, …).

    No mask is needed: a prompt's own tokens come before its padding and look back only. Where
    PyTorch has no kernel for fewer keys than queries one is given all the same, for then
    transformers repeats the keys, and the products of all tokens are not kept.
    """
    longest = max(map(len, prompts))
    tokens = torch.tensor([[*prompt, *[pad] * (longest - len(prompt))] for prompt in prompts])
    model, mask = forward.model, None
    windowless = set(windows_of(model.config) or ()) == {None}
    if windowless and not takes_groups(model.device, model.dtype):
        square = (1, 1, longest, longest)
        mask = torch.ones(square, dtype=torch.bool, device=model.device).tril()
    cache = PromptCache(model.config)
    forward(tokens.to(model.device), None, mask, cache)
    cache.stack()
    return cache
