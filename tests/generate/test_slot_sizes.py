from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from medtrain.generate.slots.sizes import MAX_SLOTS, MIN_SLOTS, Footprint, slot_length

LLAMA_8B = Footprint(
    weight_bytes=16_060_522_496,
    token_bytes=131_072,
    hidden=4096,
    number_bytes=2,
    vocabulary=128_256,
)
GIB = 2**30


@given(st.integers(1, 200_000))
def test_slots_are_long_enough_and_hardly_longer(positions: int) -> None:
    length = slot_length(positions)
    assert positions <= length <= max(128, 2 * positions)
    assert length % 128 == 0, "kernels read masks in aligned pieces"


def test_there_are_few_lengths() -> None:
    assert len({slot_length(n) for n in range(1, 8193)}) <= 12


@given(st.integers(8, 200), st.integers(1, 8192))
def test_what_is_counted_on_fits(gib: int, positions: int) -> None:
    length = slot_length(positions)
    slots = LLAMA_8B.slots_in(gib * GIB, length)
    assert MIN_SLOTS <= slots <= MAX_SLOTS
    assert slots & (slots - 1) == 0
    needed = LLAMA_8B.weight_bytes + slots * length * LLAMA_8B.token_bytes
    assert slots == MIN_SLOTS or needed < gib * GIB


def test_a_large_card_holds_many_rows_of_an_8b_model_and_a_small_one_some() -> None:
    assert LLAMA_8B.slots_in(79 * GIB, 768) == 128
    assert LLAMA_8B.slots_in(39 * GIB, 768) == 128
    assert LLAMA_8B.slots_in(22 * GIB, 768) == 8


@given(st.integers(8, 200), st.integers(1, 1_000))
def test_a_small_stage_has_no_more_slots_than_it_fills(gib: int, rows: int) -> None:
    slots = LLAMA_8B.slots_in(gib * GIB, 768, rows=rows)
    assert slots == MIN_SLOTS or slots // 2 < rows
    assert slots <= LLAMA_8B.slots_in(gib * GIB, 768)
    assert slots >= min(rows, LLAMA_8B.slots_in(gib * GIB, 768))
