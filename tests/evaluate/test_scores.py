from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medtrain.data.examples import Example
from medtrain.evaluate.answers import VariantAnswers
from medtrain.evaluate.decisions import DecisionReader
from medtrain.evaluate.judging import Key, Verdicts, judged_examples, variant_pairs
from medtrain.evaluate.loss import HeldOutLoss, RowLoss
from medtrain.evaluate.metrics import token_f1
from medtrain.evaluate.scores import Skipped, VariantMeasures, measure, score_rows, score_table
from medtrain.judge.rules import RulesJudge

ANSWER = "Drink water. The direct answer to your question is: yes."


def _example(name: str, decision: Any = None) -> Example:
    turns = ({"role": "user", "content": f"q {name}"}, {"role": "assistant", "content": ANSWER})
    return Example(name, "table", turns, f"q {name}", decision)  # type: ignore[arg-type]


def _row(text: str, finish: str = "stop") -> dict[str, Any]:
    return {"text": text, "tokens": len(text.split()), "finish": finish}


EXAMPLES = [_example("x", "yes"), _example("y", "no"), _example("z")]
BASE = VariantAnswers(
    "base", "hub/base", {"x": _row("no idea", "length"), "y": {"error": "lost"}, "z": _row("")}
)
SFT = VariantAnswers("sft", "runs/sft", {e.id: _row(ANSWER) for e in EXAMPLES})


def _measures() -> list[VariantMeasures]:
    reader = DecisionReader()
    loss = HeldOutLoss({"x": RowLoss(6.0, 2), "z": RowLoss(2.0, 2)}, 0)
    return [
        measure(BASE, EXAMPLES, [token_f1], reader, loss),
        measure(SFT, EXAMPLES, [token_f1], reader, None),
    ]


def _grades(value: int) -> dict[str, Any]:
    names = ("correctness", "clarity", "safety", "empathy")
    return {**dict.fromkeys(names, value), "justification": "so", "tokens": 9}


def _verdicts() -> Verdicts:
    pair = ("base", "sft")
    look = {"first": "a", "winner": "b", "justification": "better"}
    return Verdicts(
        rubric={
            Key("x", ("base",)): _grades(2),
            Key("z", ("base",)): {"error": "no reply"},
            Key("x", ("sft",)): {**_grades(8), "empathy": 4},
        },
        rating={Key("x", ("sft",)): {"value": 4, "justification": "good"}},
        pairwise={
            Key("x", pair): {"verdict": "b", "reason": "decided", "orders": [look]},
            Key("y", pair): {"verdict": "conflict", "reason": "conflict", "orders": []},
            Key("z", pair): {"error": "no reply"},
        },
    )


def _scores() -> dict[str, Any]:
    skipped = [Skipped("bertscore_f1", "no encoder")]
    return score_table(3, _measures(), _verdicts(), RulesJudge(), "rules", skipped)


def test_metrics_say_value_count_and_direction() -> None:
    base, sft = _scores()["variants"]
    assert base["metrics"]["token_f1"]["value"] == 0
    assert base["metrics"]["token_f1"]["n"] == 2
    assert base["metrics"]["held_out_loss"]["value"] == pytest.approx(2.0)
    assert base["metrics"]["held_out_loss"]["higher_is_better"] is False
    assert sft["metrics"]["token_f1"] == {
        "value": 1.0,
        "n": 3,
        "higher_is_better": True,
        "note": "SQuAD normalisation, mean over rows, 0-1",
    }
    assert "held_out_loss" not in sft["metrics"]


def test_answers_are_described() -> None:
    base = _scores()["variants"][0]
    assert base["answers"] == {
        "rows": 2,
        "failed": 1,
        "mean_tokens": 1,
        "stopped_share": 0.5,
        "lengths": [2, 0],
    }


def test_decisions_leave_out_rows_without_gold_and_show_unparsed_ones() -> None:
    base, sft = _scores()["variants"]
    assert base["decisions"]["unparsed"] == 1
    assert base["metrics"]["decision_accuracy"]["n"] == 1
    assert base["metrics"]["decision_accuracy"]["value"] == 0
    assert sft["metrics"]["decision_accuracy"]["value"] == 0.5
    assert sft["decisions"]["confusion"] == [[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]


def test_failed_verdicts_count_nowhere_but_are_counted() -> None:
    scores = _scores()
    base, sft = scores["variants"]
    assert base["metrics"]["rubric_mean"]["value"] == 2
    assert base["metrics"]["rubric_mean"]["n"] == 1
    assert sft["metrics"]["rubric_mean"]["value"] == pytest.approx((8 * 3 + 4) / 4)
    assert "rating" not in base["metrics"]
    assert scores["pairwise"] == [
        {
            "first": "base",
            "second": "sft",
            "first_wins": 0,
            "second_wins": 1,
            "ties": 0,
            "conflicts": 1,
            "failed": 1,
            "second_win_rate": 0.75,
        }
    ]


def test_the_judge_is_named_with_its_numbers() -> None:
    assert _scores()["judge"] == {
        "kind": "rules",
        "label": RulesJudge.label,
        "stand_in": True,
    }
    assert score_table(3, _measures(), Verdicts(), None, "rules", [])["judge"] is None


def test_rows_hold_every_variants_answer_with_its_measures() -> None:
    rows = list(score_rows(EXAMPLES, _measures(), _verdicts()))
    x, y, z = json.loads(json.dumps(rows))
    assert (x["question"], x["reference"], x["decision"]) == ("q x", ANSWER, "yes")
    assert x["variants"]["base"]["metrics"] == {"token_f1": 0.0, "loss": 3.0}
    assert x["variants"]["base"]["decision"] == "unparsed"
    assert x["variants"]["sft"]["grades"]["empathy"] == 4
    assert "tokens" not in x["variants"]["sft"]["grades"]
    assert x["variants"]["sft"]["rating"] == {"value": 4, "justification": "good"}
    assert x["pairwise"][0]["verdict"] == "second"
    assert x["pairwise"][0]["justification"] == "base shown first: better"
    assert y["variants"]["base"] == {"error": "lost", "metrics": {}}
    assert y["pairwise"][0]["verdict"] == "conflict"
    assert "decision" not in z
    assert "decision" not in z["variants"]["sft"]
    assert z["pairwise"][0] == {
        "first": "base",
        "second": "sft",
        "verdict": "failed",
        "justification": "no reply",
    }


def test_pairs_of_variants() -> None:
    assert variant_pairs(["a"]) == []
    assert variant_pairs(["a", "b"]) == [("a", "b")]
    assert variant_pairs(["a", "b", "c"]) == [("a", "b"), ("b", "c"), ("a", "c")]


@settings(deadline=None)
@given(st.sets(st.text("abcdef", min_size=1, max_size=6), min_size=1, max_size=30), st.data())
def test_judged_rows_are_a_stable_draw(names: set[str], data: st.DataObject) -> None:
    examples = [_example(name) for name in sorted(names)]
    limit = data.draw(st.integers(1, 35))
    chosen = judged_examples(examples, limit)
    assert len(chosen) == min(limit, len(examples))
    assert chosen == [e for e in examples if e in chosen]
    # Another row in the split pushes at most one chosen row out.
    grown = judged_examples([*examples, _example("new")], limit)
    assert len({e.id for e in chosen} - {e.id for e in grown}) <= 1
