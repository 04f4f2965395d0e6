"""How long slots are, and how many of them a card holds.

Both follow from the card, the model, the whole stage's rows and a unit of prompts alone, never from
what happens to be free or from a shard: the same plan gives the same answers on the same kind of
card, however it is cut.
"""

from __future__ import annotations

from dataclasses import dataclass

_LENGTHS = (128, 256, 384, 512, 768)
"""Of slots, in positions; from 1,024 on every power of two and the number half-way to the next."""
MAX_SLOTS = 128
"""A step costs what its slots cost, taken or not: shards of few rows must not pay for many."""
MIN_SLOTS = 8
"""Tried however little room is counted on; where they do not fit, there will be half as many."""
READ_TOKENS = 4_096
"""Of prompts that are read in one pass: enough to keep a GPU busy, and little memory."""
MAX_SHARE = 0.9
"""Of a card's memory that is counted on."""
RESERVE_BYTES = 1 << 30
"""For the CUDA context, cuBLAS and gaps between blocks."""
_LOGIT_BYTES = 64
"""A row's scratch for each vocabulary entry while a token is drawn: logits, and keys to sort by."""
_PROMPT_NUMBERS = 24
"""Numbers of hidden size that a prompt's token needs at the same time while it is read."""


def slot_length(positions: int) -> int:
    """The length of slots for rows of at most this many positions; few lengths, because each wants
    buffers and a recording of its own."""
    for length in _LENGTHS:
        if positions <= length:
            return length
    length = 1_024
    while length < positions:
        half_way = length + length // 2
        length = half_way if positions <= half_way else 2 * length
    return length


@dataclass(frozen=True, slots=True)
class Footprint:
    """What of a model fills a card."""

    weight_bytes: int
    token_bytes: int
    """Keys and values of one token, all layers."""
    hidden: int
    """The width of its hidden states."""
    number_bytes: int
    """Of a number that is computed with."""
    vocabulary: int

    def slots_in(
        self, memory_bytes: int, length: int, *, samples: int = 1, rows: int | None = None
    ) -> int:
        """How many slots there are to be: a power of two from MIN_SLOTS to MAX_SLOTS.

        Args:
            memory_bytes: of the card.
            length: of a slot.
            samples: of a prompt, whose keys and values are laid out for all of them on their way.
            rows: that the whole stage has; None where nobody knows.
        """
        kept = (2 + samples) * self.token_bytes  # as they were read, in a stack, on their way
        a_read_token = kept + _PROMPT_NUMBERS * self.hidden * self.number_bytes
        reading = max(READ_TOKENS, length) * a_read_token
        room = int(MAX_SHARE * memory_bytes) - self.weight_bytes - RESERVE_BYTES - reading
        fitting = room // (length * self.token_bytes + self.vocabulary * _LOGIT_BYTES)
        slots = 1 << (max(MIN_SLOTS, min(MAX_SLOTS, fitting)).bit_length() - 1)
        return slots if rows is None else min(slots, max(MIN_SLOTS, 1 << (rows - 1).bit_length()))
