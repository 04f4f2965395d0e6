"""Seconds of rows, fitted to what finished shards took, and plans cut by them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medtrain.shards import Request, make_plan, shard_progress
from medtrain.shards.costs import CostModel, fit_costs, measured_costs

from .sets import run


def receipt(seconds: float, rows: int, prompt: int, tokens: int, budget: int = 0) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "computed": {
            "rows": rows,
            "prompt_tokens": prompt,
            "tokens": tokens,
            "max_answer_tokens": budget or tokens,
        },
    }


def taken(model: CostModel, rows: int, prompt: int, tokens: int) -> float:
    return model.prompt_token_s * prompt + model.answer_token_s * tokens + model.row_s * rows


def test_varied_shards_tell_the_terms() -> None:
    chance, true = random.Random(1), CostModel(0.0002, 0.01, 0.05)
    shards = []
    for _ in range(100):
        rows = chance.randint(50, 150)
        prompt = rows * chance.randint(50, 1500)
        tokens = rows * chance.randint(20, 400)
        noise = chance.uniform(0.97, 1.03)
        seconds = noise * taken(true, rows, prompt, tokens)
        shards.append(receipt(seconds, rows, prompt, tokens, 2 * tokens))
    model = fit_costs(shards)
    assert model is not None
    assert model.prompt_token_s == pytest.approx(true.prompt_token_s, rel=0.25)
    assert model.answer_token_s == pytest.approx(true.answer_token_s, rel=0.1)
    assert model.answer_share == pytest.approx(0.5)


def test_one_shard_tells_the_scale() -> None:
    model = fit_costs([receipt(120.0, 100, 40_000, 10_000)])
    assert model is not None
    assert taken(model, 100, 40_000, 10_000) == pytest.approx(120, rel=0.01)
    assert model.answer_token_s > model.prompt_token_s > 0


def test_nothing_measured_is_no_model(tmp_path: Path) -> None:
    assert fit_costs([]) is None
    assert fit_costs([{"seconds": 0.0}, receipt(0.0, 5, 5, 5), receipt(3.0, 0, 0, 0)]) is None
    assert measured_costs(tmp_path) is None


measurements = st.builds(
    receipt,
    st.floats(0.001, 1e6),
    st.integers(1, 10**6),
    st.integers(0, 10**9),
    st.integers(0, 10**9),
)


@given(st.lists(measurements, min_size=1, max_size=8))
def test_no_term_is_negative_and_not_all_are_zero(shards: list[dict[str, Any]]) -> None:
    model = fit_costs(shards)
    assert model is not None
    assert min(model.prompt_token_s, model.answer_token_s, model.row_s) >= 0
    assert model.prompt_token_s + model.answer_token_s + model.row_s > 0
    assert 0 < model.answer_share <= 1


def test_weights_move_batches_between_shards_and_change_none() -> None:
    rows = [Request(f"r{i}", {}, 1.0 + i, prompt_tokens=10 * i) for i in range(40)]
    model = CostModel(1.0, 0.0, 0.0)
    weights = model.weights(rows)
    assert weights == [10.0 * i for i in range(40)]
    plain = make_plan(rows, {}, batch_size=4, num_shards=3)
    weighted = make_plan(
        rows, {}, batch_size=4, num_shards=3, weights=[1.0 + 1000 * (i < 4) for i in range(40)]
    )
    batches = [
        sorted(batch for shard in range(3) for batch in plan.batches(shard))
        for plan in (plain, weighted)
    ]
    assert batches[0] == batches[1]
    assert plain.plan_id == weighted.plan_id
    heavy = next(shard for shard in range(3) if 0 in weighted.positions(shard))
    assert len(weighted.positions(heavy)) == 4
    assert model.weights([Request("a", {}, 3.0)]) is None


def test_receipts_hold_what_a_fit_needs(tmp_path: Path) -> None:
    rows = [
        Request(f"r{i}", {"x": i}, prompt_tokens=10, max_answer_tokens=6, cost=i) for i in range(9)
    ]
    run(tmp_path, rows, num_shards=2)
    sums = [
        json.loads(path.read_text())["computed"] for path in tmp_path.glob("shards/*/done.json")
    ]
    total = {name: sum(shard[name] for shard in sums) for name in sums[0]}
    assert total == {"rows": 9, "tokens": 27, "prompt_tokens": 90, "max_answer_tokens": 54}
    model = measured_costs(tmp_path)
    assert model is not None
    assert model.answer_share == pytest.approx(0.5)
    assert shard_progress(tmp_path).tokens == 27
