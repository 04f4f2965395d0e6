"""One step of all slots: forward, draw, stop test, bookkeeping, all on the device.

Everything that a step reads and writes lies in tensors that stay where they are, so that a step can
be recorded and replayed; the host looks at `status` now and then. A row enters with all of its
prompt in the cache and the prompt's last token still to be run: its first step gives it its first
token, like every other.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medtrain.generate.draw import NOT_A_NUMBER, choose
from medtrain.generate.engine import Finish
from medtrain.generate.forward import Forward
from medtrain.generate.sampling import Sampling
from medtrain.generate.slots.attention import slots_in_use
from medtrain.generate.slots.cache import PromptCache, SlotCache

IDLE, GOING, STOPPED, FULL, BROKEN = range(5)
FINISHES: dict[int, Finish] = {STOPPED: "stop", FULL: "length"}


class Entry(NamedTuple):
    """A row that goes into a slot."""

    prompt: int
    """Its prompt's row in the cache of prompts."""
    last_token: int
    """Of the prompt."""
    length: int
    """Of the prompt, in tokens."""
    limit: int
    """Tokens that it may become, at least 1."""
    uniforms: NDArray[np.float64]
    """A number a token; not looked at where nothing is drawn."""


class Ended(NamedTuple):
    """What became of a slot's row."""

    slot: int
    status: int
    """STOPPED, FULL or BROKEN."""
    tokens: list[int]


class Stepper:
    """The slots of one model."""

    logits: Tensor
    """(slots, vocabulary), of the last step."""

    def __init__(
        self,
        forward: Forward,
        cache: SlotCache,
        sampling: Sampling,
        vocabulary_size: int,
        stop: Collection[int],
    ) -> None:
        """All slots idle.

        Args:
            forward: of the model.
            cache: its slots.
            sampling: how to draw.
            vocabulary_size: ids from here on are never drawn.
            stop: token ids that end a row.
        """
        self._forward, self.cache, self._sampling = forward, cache, sampling
        self._size = vocabulary_size
        self.slots, device = len(cache.positions), cache.positions.device
        longest = sampling.max_new_tokens
        self._stop = torch.tensor(sorted(stop), dtype=torch.int64, device=device)
        self.tokens = torch.zeros(self.slots, dtype=torch.int64, device=device)
        """(slots,), to be run next."""
        self.status = torch.full((self.slots,), IDLE, dtype=torch.int64, device=device)
        self._counts = torch.zeros_like(self.tokens)
        self._limits = torch.ones_like(self.tokens)
        self._output = torch.zeros((self.slots, longest), dtype=torch.int64, device=device)
        width = 1 if sampling.greedy else longest
        self._uniforms = torch.zeros((self.slots, width), dtype=torch.float64, device=device)

    def step(self) -> None:
        """One more token for every slot; those without a row come along and change nothing."""
        self.logits = self.run_model()
        place = self._counts.clamp(max=self._output.shape[1] - 1)[:, None]
        uniform = self._uniforms.gather(1, place.clamp(max=self._uniforms.shape[1] - 1))[:, 0]
        token = choose(self.logits[:, : self._size], uniform, self._sampling)
        going = self.status == GOING
        broken = going & (token == NOT_A_NUMBER)
        stopped = going & (token[:, None] == self._stop).any(dim=1)
        kept = going & ~broken & ~stopped
        before = self._output.gather(1, place)[:, 0]
        self._output.scatter_(1, place, torch.where(kept, token, before)[:, None])
        self._counts.add_(kept)
        full = kept & (self._counts >= self._limits)
        self.status.masked_fill_(broken, BROKEN)
        self.status.masked_fill_(stopped, STOPPED)
        self.status.masked_fill_(full, FULL)
        on = kept & ~full
        self.tokens.copy_(torch.where(on, token, self.tokens))
        self.cache.positions.add_(on)

    def run_model(self) -> Tensor:
        """(slots, vocabulary): what follows `tokens` at `cache.positions`."""
        self.cache.look_from_here()
        with slots_in_use(self._forward.model, self.cache):
            positions = self.cache.positions[:, None]
            return self._forward(self.tokens[:, None], positions, None, self.cache)

    def enter(self, prompts: PromptCache, entries: Sequence[Entry], slots: Sequence[int]) -> None:
        """Put rows into slots, and have them go.

        Args:
            prompts: the cache after their prompts were run.
            entries: the rows.
            slots: one for each, none of them going.
        """
        facts = [(e.prompt, e.last_token, e.length - 1, e.limit) for e in entries]
        # One copy to the device, which waits for what it has to do before.
        columns = self._on_device([slots, *zip(*facts, strict=True)])
        put, prompt, last_token, position, limit = columns
        self.cache.take(prompts, prompt, put)
        self.tokens[put], self.cache.positions[put] = last_token, position
        self._limits[put], self._counts[put], self.status[put] = limit, 0, GOING
        if not self._sampling.greedy:
            numbers = torch.zeros((len(entries), self._uniforms.shape[1]), dtype=torch.float64)
            for row, entry in enumerate(entries):
                numbers[row, : len(entry.uniforms)] = torch.from_numpy(entry.uniforms)
            self._uniforms[put] = numbers.to(self._uniforms.device)

    def look(self, busy: Sequence[int]) -> list[Ended]:
        """Wait for the device, and take the rows that ended out of these slots."""
        status = self.status.tolist()
        ended = [slot for slot in busy if status[slot] != GOING]
        if not ended:
            return []
        put = self._on_device([ended])[0]
        outputs, counts = self._output[put].tolist(), self._counts[put].tolist()
        self.status[put] = IDLE
        return [
            Ended(slot, status[slot], output[:count])
            for slot, output, count in zip(ended, outputs, counts, strict=True)
        ]

    def _on_device(self, rows: Sequence[Sequence[int]]) -> Tensor:
        numbers = torch.tensor([list(row) for row in rows], dtype=torch.int64)
        return numbers.to(self.tokens.device)
