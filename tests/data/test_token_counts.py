"""The lengths of a split's rows, as the data card has them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from medtrain.data.token_checks import TokenCounts


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=200))
def test_the_histogram_holds_every_row_where_it_belongs(lengths: list[int]) -> None:
    card = TokenCounts(lengths=lengths).to_json()
    width, rows = card["histogram"]["width"], card["histogram"]["rows"]
    assert len(rows) <= 16
    for place, count in enumerate(rows):
        low = -1 if place == 0 else place * width
        assert count == sum(low < length <= (place + 1) * width for length in lengths)
    assert sum(rows) == len(lengths)


def test_a_split_without_rows_has_no_lengths() -> None:
    assert TokenCounts().to_json() == {"total": 0, "supervised": 0}
