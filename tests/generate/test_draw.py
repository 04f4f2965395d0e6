from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medtrain.generate import draw as drawing
from medtrain.generate.draw import NOT_A_NUMBER, draw, largest_keys, most_likely
from medtrain.generate.sampling import Sampling, uniforms


def sampling(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Sampling:
    return Sampling(temperature, top_k, top_p, max_new_tokens=8)


def draws(logits: list[float], how: Sampling, count: int = 2000) -> list[int]:
    """Many draws from one distribution, as one batch."""
    numbers = torch.from_numpy(uniforms(3, count))
    return draw(torch.tensor(logits).expand(count, -1), numbers, how).tolist()


def by_the_book(logits: list[float], u: float, how: Sampling) -> int:
    """The same draw, one row at a time and without a tensor."""
    ranked = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    ranked = ranked[: how.top_k or len(ranked)]
    top = logits[ranked[0]]
    weights = {i: math.exp((logits[i] - top) / how.temperature) for i in ranked}
    total = sum(weights.values())
    kept: list[int] = []
    before = 0.0
    for i in ranked:
        if not kept or before < how.top_p:
            kept.append(i)
        before += weights[i] / total
    kept.sort()
    goal, running = u * sum(weights[i] for i in kept), 0.0
    for i in kept:
        running += weights[i]
        if running > goal:
            return i
    return kept[-1]


LOGIT = st.integers(-40, 40).map(lambda n: n / 8)  # coarse, so that many are equal
ROW = st.lists(LOGIT, min_size=6, max_size=6)
HOW = st.builds(
    sampling,
    temperature=st.sampled_from([0.3, 0.7, 1.0, 2.0]),
    top_k=st.integers(0, 8),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=5), HOW, st.integers(0, 10**6))
def test_every_row_is_drawn_by_the_book_whatever_its_neighbours(
    rows: list[list[float]], how: Sampling, seed: int
) -> None:
    numbers = uniforms(seed, len(rows))
    drawn = draw(torch.tensor(rows), torch.from_numpy(numbers), how).tolist()
    assert drawn == [by_the_book(row, u, how) for row, u in zip(rows, numbers, strict=True)]


@settings(max_examples=50, deadline=None)
@given(st.lists(ROW, min_size=2, max_size=5), HOW, st.randoms(use_true_random=False))
def test_order_does_not_change_a_draw(
    rows: list[list[float]], how: Sampling, random: object
) -> None:
    numbers = torch.from_numpy(uniforms(1, len(rows)))
    order = list(range(len(rows)))
    random.shuffle(order)  # type: ignore[attr-defined]
    logits = torch.tensor(rows)
    assert torch.equal(draw(logits[order], numbers[order], how), draw(logits, numbers, how)[order])


@pytest.mark.parametrize(
    "how", [sampling(0.7), sampling(1.5, top_k=6), sampling(1.0, top_p=0.8)], ids=str
)
def test_frequencies_follow_the_distribution(how: Sampling) -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(20, generator=generator)
    count = 40_000
    seen = np.bincount(draws(logits.tolist(), how, count), minlength=20)
    weights = (logits.double() / how.temperature).softmax(-1)
    if how.top_k:
        weights[logits < logits.topk(how.top_k).values[-1]] = 0
    if how.top_p < 1:
        ranked = weights.sort(descending=True)
        weights[ranked.indices[(ranked.values.cumsum(-1) - ranked.values) >= how.top_p]] = 0
    expected = (weights / weights.sum() * count).numpy()
    assert (seen[expected == 0] == 0).all()
    possible = expected > 0
    chi_square = ((seen - expected)[possible] ** 2 / expected[possible]).sum()
    freedom = possible.sum() - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_greedy_takes_the_lowest_of_equal_tokens() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0], [1.0, 1.0, 1.0]])
    assert draw(logits, torch.zeros(2).double(), sampling(0)).tolist() == [1, 0]


def test_top_k_keeps_exactly_k_tokens_even_if_all_are_equal() -> None:
    assert set(draws([0.0] * 100, sampling(top_k=3))) == {0, 1, 2}


@pytest.mark.parametrize("how", [sampling(top_k=1), sampling(top_p=1e-9), sampling(1e-30)], ids=str)
def test_the_narrowest_settings_are_greedy(how: Sampling) -> None:
    assert set(draws([0.1, 3.0, 0.2, 2.9], how)) == {1}


def test_top_k_beyond_the_vocabulary_is_everything() -> None:
    logits = [0.3, 0.1, 0.2]
    assert draws(logits, sampling(top_k=50)) == draws(logits, sampling())


@pytest.mark.parametrize(("top_p", "kept"), [(0.49, {0}), (0.55, {0, 1}), (0.9, {0, 1, 2})])
def test_top_p_keeps_the_fewest_tokens_that_hold_it(top_p: float, kept: set[int]) -> None:
    logits = [math.log(p) for p in (0.5, 0.3, 0.2)]
    assert set(draws(logits, sampling(top_p=top_p))) == kept


def test_a_forbidden_token_is_never_drawn() -> None:
    assert set(draws([-math.inf, 0.0, -math.inf, 0.0], sampling())) == {1, 3}
    assert set(draws([-math.inf, 0.0, -math.inf, 0.0], sampling(top_k=3, top_p=0.99))) == {1, 3}


def test_the_ends_of_the_unit_interval_give_the_ends_of_what_is_kept() -> None:
    logits = torch.zeros(2, 7)
    ends = torch.tensor([0.0, np.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert draw(logits, ends, sampling()).tolist() == [0, 6]
    assert draw(logits, ends, sampling(top_k=4)).tolist() == [0, 3]


@pytest.mark.parametrize("how", [sampling(0), sampling(), sampling(top_k=2), sampling(top_p=0.5)],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("row", [[math.nan, 0.0, 1.0], [math.inf, 0.0, 1.0], [-math.inf] * 3])
def test_what_is_no_number_is_told_apart_and_hurts_no_neighbour(
    row: list[float], how: Sampling
) -> None:
    logits = torch.tensor([row, [0.0, 9.0, 0.0]])
    drawn = draw(logits, torch.tensor([0.5, 0.5]).double(), how).tolist()
    assert drawn == [NOT_A_NUMBER, 1]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(LOGIT, min_size=9, max_size=9), min_size=1, max_size=4), st.integers(1, 9))
def test_equal_logits_rank_by_token_id(rows: list[list[float]], count: int) -> None:
    logits = torch.tensor(rows)
    expected = [sorted(range(9), key=lambda i: (-row[i], i))[:count] for row in rows]
    assert most_likely(logits, count).tolist() == expected


def test_zero_and_minus_zero_are_equal() -> None:
    logits: Tensor = torch.tensor([[-0.0, 0.0, -0.0]])
    assert most_likely(logits, 2).tolist() == [[0, 1]]
    assert largest_keys(logits, 2).tolist() == [[0, 1]]


WIDE = st.one_of(
    LOGIT,
    st.floats(-(2.0**126), 2.0**126, width=32, allow_subnormal=False),
    st.sampled_from([-math.inf, -0.0, 0.0]),
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(st.one_of(WIDE, st.just(math.nan)), min_size=8, max_size=8),
             min_size=1, max_size=4),
    st.one_of(HOW, st.just(sampling(0))),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 10**6),
)  # fmt: skip
def test_a_draw_without_a_look_at_a_value_is_the_same_draw(
    rows: list[list[float]], how: Sampling, dtype: torch.dtype, seed: int
) -> None:
    logits, numbers = torch.tensor(rows).to(dtype), torch.from_numpy(uniforms(seed, len(rows)))
    expected = draw(logits, numbers, how)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "most_likely", largest_keys)  # as on a GPU
        assert torch.equal(drawing.choose(logits, numbers, how), expected)


def test_sixteen_bit_logits_are_drawn_in_full_precision() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    number = torch.tensor([0.3]).double()
    assert torch.equal(
        draw(logits.bfloat16(), number, sampling()), draw(logits, number, sampling())
    )
