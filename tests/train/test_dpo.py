"""DPO: a start at margin 0, its reference computed before, and a plain adapter at the end."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from medtrain.errors import AdapterMismatchError, DataError, MedtrainError
from medtrain.files import read_json, read_jsonl, write_json, write_jsonl
from medtrain.train.adapter import FACTS_FILE, WEIGHTS_FILE, attach_adapter
from medtrain.train.checkpoints import Plan
from medtrain.train.dpo import train_dpo
from medtrain.train.feeding import feed_preferences, pair_collate
from medtrain.train.model import load_base
from medtrain.train.reference import compute_reference, read_reference
from medtrain.train.rows import dpo_rows
from medtrain.train.trainer_settings import PAIRED, trainer_settings
from medtrain.train.trainers import PreferenceTrainer
from tests.train.conftest import MakeRun, Ready, give_sft
from tests.train.test_model import other_base, trained_adapter


def trainer_of(ready: Ready, *, trainable: bool = True) -> PreferenceTrainer:
    base = load_base(ready.run, ready.config, ready.chat, quantized=True)
    rows = dpo_rows(ready.run, ready.config, ready.chat)
    plan = Plan(4, 4, 8, 1)
    return PreferenceTrainer(
        model=attach_adapter(base, ready.run.adapter("sft"), trainable=trainable),
        plan=plan,
        args=trainer_settings(
            PAIRED, ready.run, ready.config, "dpo", plan, validated=False, console=ready.console
        ),
        train_dataset=rows.train.dataset,
        processing_class=ready.chat.tokenizer,
    )


def test_it_learns_to_prefer_and_publishes_the_plain_adapter(make_dpo_run: MakeRun) -> None:
    ready = make_dpo_run()
    before = load_file(ready.run.adapter("sft") / WEIGHTS_FILE)
    train_dpo(ready.run, ready.config, ready.console)

    metrics = list(read_jsonl(ready.run.metrics("dpo")))
    evaluated = [line for line in metrics if line["kind"] == "eval"]
    assert evaluated[-1]["rewards_margin"] > 0.05
    assert evaluated[-1]["rewards_accuracy"] == 1.0
    assert evaluated[-1]["loss"] < 0.69

    adapter = ready.run.adapter("dpo")
    assert not [path for path in adapter.rglob("*") if path.is_dir()]
    after = load_file(adapter / WEIGHTS_FILE)
    assert after.keys() == before.keys()
    assert not any("ref" in key for key in after)
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    assert any("lora" in key for key in changed)
    assert any("trainable_tokens" in key for key in changed)
    assert read_json(adapter / FACTS_FILE)["stage"] == "dpo"


@pytest.mark.parametrize("tied", [True, False])
def test_the_policy_starts_as_the_sft_adapter_and_is_the_only_one(
    make_run: MakeRun, base_dir: Path, tmp_path: Path, tied: bool
) -> None:
    base = base_dir if tied else other_base(base_dir, tmp_path / "b", tie_word_embeddings=False)
    ready = make_run(base=base)
    trained_adapter(ready, ready.run.adapter("sft"))
    trainer = trainer_of(ready)
    assert list(trainer.model.peft_config) == ["default"]
    file = load_file(ready.run.adapter("sft") / WEIGHTS_FILE)
    parameters = dict(trainer.model.named_parameters())
    trainable = {n for n, p in parameters.items() if p.requires_grad}
    assert trainable == {n for n in parameters if "default" in n.split(".")}
    assert len(trainable) == len(file)
    for key, weight in file.items():
        stem = key.removesuffix(".weight")
        found = parameters.get(f"{stem}.default.weight", parameters.get(f"{stem}.default"))
        assert found is not None
        assert found.dtype == torch.float32
        assert torch.equal(found, weight)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_it_starts_without_a_margin(
    make_run: MakeRun, base_dir: Path, tmp_path: Path, tied: bool, packing: bool
) -> None:
    base = base_dir if tied else other_base(base_dir, tmp_path / "b", tie_word_embeddings=False)
    ready = make_run(
        base=base, dpo={"max_steps": 1, "log_every": 1, "warmup_ratio": 0, "packing": packing}
    )
    trained_adapter(ready, ready.run.adapter("sft"), dropout=0.0)
    compute_reference(*ready)
    train_dpo(*ready)
    first = next(iter(read_jsonl(ready.run.metrics("dpo"))))
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["rewards_margin"] == pytest.approx(0, abs=1e-4)
    assert first["rewards_chosen"] == pytest.approx(0, abs=1e-4)


def test_a_start_with_a_margin_is_an_error(make_run: MakeRun, sft_done: Ready) -> None:
    """The reference was computed with one adapter, and another one lies there now."""
    ready = make_run()
    give_sft(sft_done, ready)
    trained_adapter(ready, ready.run.adapter("sft"))
    with pytest.raises(MedtrainError, match="would start with a margin") as caught:
        train_dpo(*ready)
    assert "--force reference" in caught.value.fix
    assert not ready.run.adapter("dpo").exists()


def test_without_a_reference_it_says_so(make_dpo_run: MakeRun) -> None:
    ready = make_dpo_run()
    ready.run.reference.unlink()
    with pytest.raises(DataError, match="log-probabilities are missing"):
        train_dpo(*ready)


def test_a_pair_without_a_reference_is_named(make_dpo_run: MakeRun) -> None:
    ready = make_dpo_run()
    rows = dpo_rows(ready.run, ready.config, ready.chat)
    reference = read_reference(ready.run, ready.config)
    lost = rows.train.ids[5]
    del reference[lost]
    with pytest.raises(DataError, match=f"1 of {len(rows.train)} pairs, such as {lost}"):
        feed_preferences(
            rows, ready.config.dpo, Plan(4, 4, 8, 1), reference, seed=0, packed=True,
            collate=pair_collate(0, packed=True),
        )  # fmt: skip


def test_every_pair_gets_the_reference_of_its_own_answers(make_dpo_run: MakeRun) -> None:
    ready = make_dpo_run()
    rows = dpo_rows(ready.run, ready.config, ready.chat)
    reference = read_reference(ready.run, ready.config)
    fed = feed_preferences(
        rows, ready.config.dpo, Plan(4, 4, 8, 1), reference, seed=0, packed=True,
        collate=pair_collate(0, packed=True),
    )  # fmt: skip
    for dataset, part in ((fed.dataset, rows.train), (fed.validation, rows.validation)):
        found = [(row["ref_chosen_logps"], row["ref_rejected_logps"]) for row in dataset]
        assert part is not None
        assert found == [reference[row] for row in part.ids]


def test_without_a_trainable_parameter_it_stops(make_dpo_run: MakeRun) -> None:
    with pytest.raises(MedtrainError, match="no trainable parameter"):
        trainer_of(make_dpo_run(), trainable=False)


@pytest.mark.parametrize("loss_type", ["hinge", "ipo", "robust"])
def test_other_losses_train_too(make_dpo_run: MakeRun, loss_type: str) -> None:
    ready = make_dpo_run(dpo={"max_steps": 2, "loss_type": loss_type})
    assert train_dpo(*ready)["steps"] == 2


def test_no_pairs_are_one_clear_message(make_run: MakeRun) -> None:
    ready = make_run()
    write_jsonl(ready.run.preferences, [])
    with pytest.raises(DataError, match="no preference pair") as caught:
        train_dpo(ready.run, ready.config, ready.console)
    assert "num_samples" in caught.value.fix


def test_pairs_that_are_too_long_or_equal_are_counted(make_run: MakeRun) -> None:
    ready = make_run()
    pairs = list(read_jsonl(ready.run.preferences))
    pairs[0]["prompt"][0]["content"] = "long " * 200
    pairs[1]["chosen"] = "long " * 200
    pairs[2]["chosen"] = pairs[2]["rejected"]
    write_jsonl(ready.run.preferences, pairs)
    rows = dpo_rows(ready.run, ready.config, ready.chat)
    assert rows.counts.unusable_rows == 2
    assert rows.counts.answerless_rows == 1
    assert rows.counts.cut_rows == 1
    assert rows.counts.train_rows + rows.counts.validation_rows == 46


def test_pairs_of_one_prompt_stay_on_one_side(make_run: MakeRun) -> None:
    ready = make_run()
    pairs = list(read_jsonl(ready.run.preferences))
    more = [{**pair, "id": f"{pair['id']}b", "rejected": "Never mind."} for pair in pairs]
    write_jsonl(ready.run.preferences, [*pairs, *more])
    rows = dpo_rows(ready.run, ready.config, ready.chat)
    assert rows.validation is not None
    sides = [
        {tuple(ids) for ids in side.dataset["prompt_ids"]} for side in (rows.train, rows.validation)
    ]
    assert sides[0].isdisjoint(sides[1])
    assert rows.counts.validation_rows == 2 * len(sides[1])


def test_answers_end_with_the_end_token(make_run: MakeRun) -> None:
    ready = make_run()
    for row in dpo_rows(ready.run, ready.config, ready.chat).train.dataset:
        assert row["chosen_ids"][-1] == row["rejected_ids"][-1] == ready.chat.end_token_id


def test_an_answer_cut_at_the_token_limit_gets_no_end_token(make_run: MakeRun) -> None:
    ready = make_run()
    pairs = [dict(row) for row in read_jsonl(ready.run.preferences)]
    write_jsonl(ready.run.preferences, [{**row, "chosen_cut": True} for row in pairs])
    rows = dpo_rows(ready.run, ready.config, ready.chat)
    end = ready.chat.end_token_id
    assert all(row["chosen_ids"][-1] != end for row in rows.train.dataset)
    assert all(row["rejected_ids"][-1] == end for row in rows.train.dataset)


def test_an_sft_adapter_of_another_vocabulary_is_refused(make_dpo_run: MakeRun) -> None:
    ready = make_dpo_run()
    facts = ready.run.adapter("sft") / FACTS_FILE
    write_json(facts, {**read_json(facts), "vocab_rows": 700})
    with pytest.raises(AdapterMismatchError, match="700 rows"):
        train_dpo(ready.run, ready.config, ready.console)


def test_without_an_sft_adapter_it_says_so(make_run: MakeRun) -> None:
    ready = make_run()
    with pytest.raises(DataError, match="holds no adapter"):
        train_dpo(ready.run, ready.config, ready.console)
