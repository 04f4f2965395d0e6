from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from medtrain.config import RunConfig, parse_config
from medtrain.console import Console
from medtrain.data.examples import Example
from medtrain.data.tokenizer import prepare_tokenizer
from medtrain.errors import DataError, EndpointError
from medtrain.evaluate.stage import evaluate
from medtrain.files import write_jsonl
from medtrain.generate.transformers_engine import TransformersEngine
from medtrain.run import Run
from tests.tiny import tiny_base

Evaluate = Callable[..., dict[str, Any]]

QUESTIONS = 7


def _config(base: Path, **evaluate_fields: Any) -> RunConfig:
    fields = {"max_new_tokens": 12, "batch_size": 3, **evaluate_fields}
    return parse_config(
        {
            "name": "tiny",
            "model": {"base": str(base), "quantization": "none", "system_prompt": "Be kind."},
            "data": {"sources": [{"adapter": "table", "path": "none.jsonl"}]},
            "judge": {"kind": "rules"},
            "evaluate": fields,
        }
    )


def _example(number: int) -> Example:
    decision = ("yes", "no", None)[number % 3]
    closing = f" The direct answer to your question is: {decision}." if decision else ""
    question = f"What are the symptoms of anaemia in patient {number}?"
    answer = f"Tiredness and pale skin are common after {number} days. See a doctor.{closing}"
    turns = (
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    )
    return Example(f"{number:016x}", "table", turns, question, decision)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def trained(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory as the stages before `evaluate` leave it; read-only by agreement."""
    import torch

    from medtrain.train.model import load_base

    run, config = Run(tmp_path_factory.mktemp("trained") / "tiny"), _config(base_dir)
    run.create()
    write_jsonl(run.eval_rows, [_example(i).to_json() for i in range(QUESTIONS)])
    chat = prepare_tokenizer(run, config)
    for seed, stage in enumerate(("sft", "dpo")):
        model = load_base(run, config, chat, quantized=False)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            for weight in model.parameters():
                weight += 0.1 * torch.randn_like(weight)
        model.save_pretrained(run.merged(stage))  # type: ignore[arg-type]
        chat.save(run.merged(stage))  # type: ignore[arg-type]
    return run.root


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Run:
    shutil.copytree(trained, tmp_path / "tiny")
    return Run(tmp_path / "tiny")


def _evaluate(run: Run, config: RunConfig) -> dict[str, Any]:
    return evaluate(run, config, Console(quiet=True))


def _outputs(run: Run) -> dict[str, bytes]:
    """Everything the stage publishes, receipts and journals (which hold times) left out."""
    paths = [
        run.scores,
        run.evaluation_rows,
        *(run.answers(name) for name in ("base", "sft", "dpo")),
        *(run.held_out_loss(name) for name in ("base", "sft", "dpo")),
        *(run.evaluate_verdicts(protocol) for protocol in ("rubric", "rating", "pairwise")),
    ]
    return {str(path.relative_to(run.root)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def undisturbed(
    trained: Path, base_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    root = tmp_path_factory.mktemp("undisturbed") / "tiny"
    shutil.copytree(trained, root)
    _evaluate(Run(root), _config(base_dir))
    return _outputs(Run(root))


def test_every_variant_is_answered_measured_and_judged(run: Run, base_dir: Path) -> None:
    counts = _evaluate(run, _config(base_dir))
    scores = json.loads(run.scores.read_bytes())
    assert [v["name"] for v in scores["variants"]] == ["base", "sft", "dpo"]
    assert scores["questions"] == QUESTIONS
    assert scores["judge"]["stand_in"] is True
    expected = {
        *("token_f1", "bleu", "rouge1", "rouge2", "rougeL", "held_out_loss", "rating"),
        *("decision_accuracy", "decision_macro_f1", "decision_weighted_f1"),
        *(f"rubric_{d}" for d in ("correctness", "clarity", "safety", "empathy", "mean")),
    }
    for variant in scores["variants"]:
        assert set(variant["metrics"]) == expected
        assert variant["metrics"]["token_f1"]["n"] == QUESTIONS
        assert variant["metrics"]["decision_accuracy"]["n"] == 5
        assert variant["metrics"]["held_out_loss"]["value"] == pytest.approx(6.3, abs=1)
    assert [(p["first"], p["second"]) for p in scores["pairwise"]] == [
        ("base", "sft"),
        ("sft", "dpo"),
        ("base", "dpo"),
    ]
    assert {s["metric"] for s in scores["skipped"]} == {"bertscore_f1"}
    assert counts["verdicts"] == QUESTIONS * (3 + 3 + 3)
    assert counts["failed_answers"] == counts["failed_verdicts"] == 0
    rows = [json.loads(line) for line in (run.evaluation_rows).open()]
    assert [row["id"] for row in rows] == [f"{i:016x}" for i in range(QUESTIONS)]
    assert set(rows[0]["variants"]["dpo"]) == {
        *("text", "tokens", "finish", "metrics", "decision", "grades", "rating")
    }
    assert "loss" in rows[0]["variants"]["dpo"]["metrics"]


def test_a_random_models_decisions_are_unparsed_and_wrong(undisturbed: dict[str, bytes]) -> None:
    for variant in json.loads(undisturbed["evaluate/scores.json"])["variants"]:
        assert variant["decisions"]["unparsed"] == 5
        assert variant["metrics"]["decision_accuracy"]["value"] == 0


def test_a_finished_stage_started_again_loads_nothing_and_changes_nothing(
    run: Run, base_dir: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    _evaluate(run, _config(base_dir))
    monkeypatch.setattr("medtrain.train.model.load_base", _must_not_load)
    monkeypatch.setattr("medtrain.train.model.load_merged", _must_not_load)
    _evaluate(run, _config(base_dir))
    assert _outputs(run) == undisturbed


def test_each_model_is_loaded_once_and_released_before_the_next(
    run: Run, base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gc
    import weakref

    from medtrain.train import model as models

    alive: list[weakref.ref[Any]] = []

    def watched(load: Callable[..., Any]) -> Callable[..., Any]:
        def watching(*args: Any, **kwargs: Any) -> Any:
            gc.collect()
            assert [ref for ref in alive if ref() is not None] == []
            model = load(*args, **kwargs)
            alive.append(weakref.ref(model))
            return model

        return watching

    monkeypatch.setattr(models, "load_base", watched(models.load_base))
    monkeypatch.setattr(models, "load_merged", watched(models.load_merged))
    _evaluate(run, _config(base_dir))
    assert len(alive) == 3


def _must_not_load(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("a model was loaded")


@pytest.mark.parametrize("rows_before_the_end", [2, 10])
def test_stopped_while_answering_it_resumes_to_the_same_bytes(
    run: Run,
    base_dir: Path,
    undisturbed: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    rows_before_the_end: int,
) -> None:
    answer, left = TransformersEngine.answer, [rows_before_the_end]

    def cut_short(engine: TransformersEngine, batches: Any) -> Iterator[Any]:
        for answered in answer(engine, batches):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            yield answered

    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "answer", cut_short)
        with pytest.raises(KeyboardInterrupt):
            _evaluate(run, _config(base_dir))
    assert not run.scores.exists()
    _evaluate(run, _config(base_dir))
    assert _outputs(run) == undisturbed


def test_a_judge_out_of_reach_costs_no_answer(
    run: Run, base_dir: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    from medtrain.judge.rules import RulesJudge

    def unreachable(*args: Any) -> Any:
        raise EndpointError("The judge cannot be reached")

    with monkeypatch.context() as patch:
        patch.setattr(RulesJudge, "compare", unreachable)
        with pytest.raises(EndpointError):
            _evaluate(run, _config(base_dir))
    monkeypatch.setattr("medtrain.train.model.load_base", _must_not_load)
    monkeypatch.setattr("medtrain.train.model.load_merged", _must_not_load)
    _evaluate(run, _config(base_dir))
    assert _outputs(run) == undisturbed


def test_shards_and_batches_change_no_answer(
    run: Run, base_dir: Path, undisturbed: dict[str, bytes]
) -> None:
    _evaluate(run, _config(base_dir, num_shards=3, variants=["sft"]))
    assert run.answers("sft").read_bytes() == undisturbed["evaluate/sft/answers.jsonl"]
    assert run.held_out_loss("sft").read_bytes() == undisturbed["evaluate/sft/loss.jsonl"]


def test_a_question_without_an_answer_is_left_out_and_counted(run: Run, base_dir: Path) -> None:
    too_long = "Is a fever dangerous? " * 200
    turns = ({"role": "user", "content": too_long}, {"role": "assistant", "content": "Yes."})
    long = Example("f" * 16, "table", turns, too_long, "yes")  # type: ignore[arg-type]
    write_jsonl(run.eval_rows, [_example(0).to_json(), long.to_json()])
    counts = _evaluate(run, _config(base_dir, variants=["base", "sft"]))
    assert counts["failed_answers"] == 2
    first, second = [json.loads(line) for line in run.evaluation_rows.open()]
    assert "context" in second["variants"]["sft"]["error"]
    assert second["pairwise"] == []
    assert "grades" in first["variants"]["sft"]
    metrics = json.loads(run.scores.read_bytes())["variants"][1]["metrics"]
    assert metrics["token_f1"]["n"] == metrics["decision_accuracy"]["n"] == 1
    write_jsonl(run.eval_rows, [long.to_json()])
    with pytest.raises(DataError, match="base answered none of 1 questions"):
        _evaluate(run, _config(base_dir))


def test_too_many_failed_verdicts_end_the_stage(
    run: Run, base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medtrain.judge import RowFailedError
    from medtrain.judge.rules import RulesJudge

    grade, asked = RulesJudge.grade, []

    def sometimes(judge: RulesJudge, *args: Any) -> Any:
        asked.append(1)
        if len(asked) % 3 == 0:
            raise RowFailedError("no JSON")
        return grade(judge, *args)

    monkeypatch.setattr(RulesJudge, "grade", sometimes)
    config = _config(base_dir, variants=["sft", "dpo"])
    with pytest.raises(EndpointError, match="failed on 4 of 14 rows of rubric"):
        _evaluate(run, config)
    monkeypatch.setattr(RulesJudge, "grade", grade)
    assert _evaluate(run, config)["failed_verdicts"] == 0


def test_an_encoder_adds_bertscore(run: Run, base_dir: Path, encoder: Path) -> None:
    _evaluate(run, _config(base_dir, bertscore_model=str(encoder), variants=["sft"]))
    scores = json.loads(run.scores.read_bytes())
    metric = scores["variants"][0]["metrics"]["bertscore_f1"]
    assert metric["n"] == QUESTIONS
    assert 0 <= metric["value"] <= 1
    assert {s["metric"] for s in scores["skipped"]} == {"pairwise"}
    first = json.loads(run.evaluation_rows.open().readline())
    assert "bertscore_f1" in first["variants"]["sft"]["metrics"]


def test_max_judged_judges_the_same_questions_for_every_variant(run: Run, base_dir: Path) -> None:
    _evaluate(run, _config(base_dir, max_judged=2, variants=["base", "sft"]))
    rows = [json.loads(line) for line in (run.evaluation_rows).open()]
    judged = [row["id"] for row in rows if row["pairwise"]]
    assert len(judged) == 2
    for name in ("base", "sft"):
        assert [r["id"] for r in rows if "grades" in r["variants"][name]] == judged


def test_without_a_judge_nothing_is_judged_and_the_reasons_are_given(
    run: Run, base_dir: Path
) -> None:
    _evaluate(run, _config(base_dir, rubric=False, rating=False, pairwise=False, variants=["sft"]))
    scores = json.loads(run.scores.read_bytes())
    assert scores["judge"] is None
    assert scores["pairwise"] == []
    skipped = {s["metric"]: s["reason"] for s in scores["skipped"]}
    assert skipped["rubric"] == "evaluate.rubric is off"
    assert not (run.evaluate / "judge").exists()


def test_models_of_others_bring_their_own_chat_format(
    run: Run, base_dir: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    own = tmp_path / "own"
    shutil.copytree(tiny_base(tmp_path / "other", bos=True), own)
    tokenizer = AutoTokenizer.from_pretrained(own)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(own)
    variants = [
        "base",
        {"name": "merged-elsewhere", "path": str(run.merged("sft"))},
        {"name": "own-format", "path": str(own)},
        {"name": "no-format", "path": str(tmp_path / "other")},
    ]
    _evaluate(run, _config(base_dir, variants=variants, rubric=False, rating=False))
    scores = json.loads(run.scores.read_bytes())
    metrics = {v["name"]: v["metrics"] for v in scores["variants"]}
    assert set(metrics) == {"base", "merged-elsewhere", "own-format", "no-format"}
    assert "held_out_loss" in metrics["merged-elsewhere"]
    assert "held_out_loss" not in metrics["own-format"]
    reasons = [s["reason"] for s in scores["skipped"] if s["metric"] == "held_out_loss"]
    assert any("own-format" in reason for reason in reasons)
    assert len(scores["pairwise"]) == 4


def test_held_out_loss_can_be_left_out(run: Run, base_dir: Path) -> None:
    _evaluate(run, _config(base_dir, held_out_loss=False, variants=["base"]))
    scores = json.loads(run.scores.read_bytes())
    assert {"metric": "held_out_loss", "reason": "evaluate.held_out_loss is off"} in scores[
        "skipped"
    ]


def test_what_is_missing_is_said_before_any_work(run: Run, base_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="encoder"):
        _evaluate(run, _config(base_dir, bertscore_model=str(tmp_path / "absent")))
    absent = {"name": "mine", "path": str(tmp_path / "absent")}
    with pytest.raises(DataError, match=r"evaluate\.variants, mine"):
        _evaluate(run, _config(base_dir, variants=["base", absent]))
    shutil.rmtree(run.merged("dpo"))
    with pytest.raises(DataError, match="merged dpo model"):
        _evaluate(run, _config(base_dir))
    assert not run.evaluate.exists()
    write_jsonl(run.eval_rows, [])
    with pytest.raises(DataError, match="no evaluation row"):
        _evaluate(run, _config(base_dir))
