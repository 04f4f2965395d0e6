"""How a step's rows are put into forward passes changes nothing of what is learnt."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from medtrain.files import read_jsonl, write_jsonl
from medtrain.run import Trained
from medtrain.train.adapter import WEIGHTS_FILE
from medtrain.train.checkpoints import Plan
from medtrain.train.feeding import feed_supervised
from medtrain.train.model import load_base
from medtrain.train.reference import compute_reference
from medtrain.train.rows import IGNORED, sft_rows
from tests.train.conftest import MakeRun, Ready
from tests.train.test_model import trained_adapter
from tests.train.training import losses, same_training, train

_SHARED = {"max_steps": 7, "log_every": 1, "max_length": 192, "learning_rate": 2e-3,
           "eval_batch_size": 3}  # fmt: skip
_WORDS = ("rest", "water", "exercise", "medicine", "doctor", "sleep", "salt", "heart", "pain")


def with_uneven_answers(ready: Ready) -> Ready:
    """Answers of one word beside answers of a hundred: a mean of means would be another loss."""
    drawn = random.Random(0)

    def answer() -> str:
        return " ".join(drawn.choices(_WORDS, k=drawn.choice([1, 2, 5, 60, 100])))

    examples = [dict(row) for row in read_jsonl(ready.run.train_rows)]
    for row in examples:
        row["messages"][1]["content"] = answer()
    write_jsonl(ready.run.train_rows, examples)
    pairs = [dict(row) for row in read_jsonl(ready.run.preferences)]
    for row in pairs:
        row["chosen"], row["rejected"] = f"Yes: {answer()}", f"No: {answer()}"
    write_jsonl(ready.run.preferences, pairs)
    return ready


def started(make_run: MakeRun, name: str, stage: Trained, **changes: Any) -> Ready:
    options = {**_SHARED, **changes}
    if stage == "sft":
        options["lora"] = {"r": 4, "dropout": 0.0}
    ready = with_uneven_answers(make_run(name, **{stage: options}))
    if stage == "dpo":
        trained_adapter(ready, ready.run.adapter("sft"), dropout=0.0)
        compute_reference(*ready)
    return ready


def weights(ready: Ready, stage: Trained) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(ready.run.adapter(stage) / WEIGHTS_FILE)
    return found


_WAYS: dict[str, dict[str, Any]] = {
    "one-by-one-packed": {"batch_size": 1, "gradient_accumulation": 8, "packing": True},
    "four-by-four-packed": {"batch_size": 4, "gradient_accumulation": 2, "packing": True},
    "all-at-once-padded": {"batch_size": 8, "gradient_accumulation": 1, "packing": False},
    "two-by-two-padded": {"batch_size": 2, "gradient_accumulation": 4, "packing": False},
}


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_step_learns_the_same_however_it_is_computed(make_run: MakeRun, stage: Trained) -> None:
    whole = started(make_run, "whole", stage, batch_size=8, gradient_accumulation=1, packing=True)
    expected = train(whole, stage)
    for name, way in _WAYS.items():
        ready = started(make_run, name, stage, **way)
        found = train(ready, stage)
        assert found["steps"] == expected["steps"]
        for kind in ("train", "eval"):
            assert losses(ready.run, stage, kind) == pytest.approx(
                losses(whole.run, stage, kind), rel=1e-5, abs=1e-5
            ), f"{kind} losses of {name}"
        theirs, ours = weights(whole, stage), weights(ready, stage)
        assert theirs.keys() == ours.keys()
        for key, weight in theirs.items():
            # Adam divides by the gradient's size: rounding shows where that is next to nothing.
            torch.testing.assert_close(ours[key], weight, atol=2e-4, rtol=1e-3)
    assert len(losses(whole.run, stage)) == 7


@pytest.mark.parametrize("packing", [True, False])
def test_every_token_counts_alike(make_run: MakeRun, packing: bool) -> None:
    """The first loss is the mean over all answer tokens of the step, from plain logits."""
    ready = started(make_run, "run", "sft", max_steps=1, warmup_ratio=0, batch_size=2,
                    gradient_accumulation=4, packing=packing)  # fmt: skip
    train(ready, "sft")

    rows = sft_rows(ready.run, ready.config, ready.chat)
    fed = feed_supervised(
        rows, ready.config.sft, Plan(1, 6, 8, 1), seed=ready.config.seed, pad_token_id=0,
        packed=packing,
    )  # fmt: skip
    model = load_base(ready.run, ready.config, ready.chat, quantized=True)
    nats = []
    for place in fed.plan.rows_of(0, 0):
        row = rows.train.dataset[place]
        labels = torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            log_probs = model(torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1)
        learnt = labels != IGNORED
        nats.append(-log_probs[learnt].gather(1, labels[learnt][:, None])[:, 0])
    sizes = [len(each) for each in nats]
    assert max(sizes) > 5 * min(sizes)
    assert sum(sizes) == sum(fed.items[place] for place in fed.plan.rows_of(0, 0))
    assert losses(ready.run, "sft")[0] == pytest.approx(float(torch.cat(nats).mean()), abs=1e-5)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_an_evaluation_does_not_depend_on_its_batches(make_run: MakeRun, stage: Trained) -> None:
    found = []
    for size in (1, 2, 5, 64):
        ready = started(make_run, f"of-{size}", stage, max_steps=1, warmup_ratio=0, batch_size=4,
                        evals_per_epoch=0, eval_batch_size=size)  # fmt: skip
        train(ready, stage)
        found += losses(ready.run, stage, "eval")
    assert len(found) == 4
    assert found == pytest.approx([found[0]] * 4, rel=1e-5)


def test_reading_ahead_changes_nothing(make_run: MakeRun) -> None:
    here = started(make_run, "here", "sft", batch_size=4)
    ahead = started(make_run, "ahead", "sft", batch_size=4, trainer={"dataloader_num_workers": 1})
    for ready in (here, ahead):
        train(ready, "sft")
    same_training(ahead.run, here.run, "sft")
