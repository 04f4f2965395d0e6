"""Supervised fine-tuning from rows to a published adapter."""

from __future__ import annotations

import errno
import json
import math
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from medtrain.config import parse_config
from medtrain.console import Console
from medtrain.errors import ConfigError, DataError, MedtrainError, TryAgainError
from medtrain.files import read_json, read_jsonl
from medtrain.memory import architecture_of
from medtrain.memory.choose import tried_estimates
from medtrain.train.adapter import FACTS_FILE, WEIGHTS_FILE
from medtrain.train.checkpoints import Plan, best_step, evaluations_since_best
from medtrain.train.model import load_base
from medtrain.train.rows import IGNORED, is_validation, sft_rows
from medtrain.train.sft import train_sft
from medtrain.train.telemetry import Telemetry, metrics_line
from medtrain.train.trainer_settings import (
    SUPERVISED,
    choose_optimizer,
    make_plan,
    trainer_settings,
)
from medtrain.train.trainers import SupervisedTrainer
from tests.train.conftest import MakeRun, Ready, adapter_bytes


def settings(ready: Ready, plan: Plan, *, validated: bool = True) -> Any:
    return trainer_settings(
        SUPERVISED, ready.run, ready.config, "sft", plan, validated=validated, console=ready.console
    )


def test_it_learns_and_publishes_a_whole_adapter(make_run: MakeRun) -> None:
    ready = make_run(sft={"epochs": 4})
    counts = train_sft(ready.run, ready.config, ready.console)

    metrics = list(read_jsonl(ready.run.metrics("sft")))
    evaluated = [line["loss"] for line in metrics if line["kind"] == "eval"]
    assert evaluated[-1] < evaluated[0]
    assert counts["validation_loss"] == pytest.approx(min(evaluated), abs=1e-4)
    assert counts["train_rows"] + counts["validation_rows"] == 48
    assert {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens"} <= set(metrics[0])
    steps = [line["step"] for line in metrics if line["kind"] == "train"]
    assert steps == sorted(set(steps))
    assert steps[-1] == counts["steps"]

    adapter = ready.run.adapter("sft")
    facts = read_json(adapter / FACTS_FILE)
    assert facts["vocab_rows"] == ready.chat.vocab_rows
    assert facts["new_token_ids"] == ready.chat.new_token_ids
    assert (adapter / "tokenizer.json").is_file()
    assert not [p for p in adapter.rglob("*") if p.is_dir() or p.name.startswith(".")]
    assert [p.name for p in adapter.parent.iterdir() if p.name.startswith(".")] == []


def test_the_rows_of_new_tokens_are_trained(make_run: MakeRun) -> None:
    ready = make_run(sft={"max_steps": 3})
    train_sft(ready.run, ready.config, ready.console)
    weights = load_file(ready.run.adapter("sft") / WEIGHTS_FILE)
    trained = next(w for key, w in weights.items() if "trainable_tokens" in key)
    base = load_base(ready.run, ready.config, ready.chat, quantized=False)
    start = base.get_input_embeddings().weight[ready.chat.new_token_ids]
    assert trained.shape == start.shape
    assert not torch.equal(trained, start)


def test_the_same_settings_give_the_same_bytes(make_run: MakeRun) -> None:
    runs = [make_run(name, sft={"max_steps": 3}) for name in ("one", "two")]
    for ready in runs:
        train_sft(ready.run, ready.config, ready.console)
    assert adapter_bytes(runs[0].run, "sft") == adapter_bytes(runs[1].run, "sft")


@pytest.mark.parametrize(
    "model", [{"quantization": "none"}, {"dtype": "bfloat16"}, {"attention": "eager"}]
)
def test_other_precisions_train_too(make_run: MakeRun, model: dict[str, str]) -> None:
    ready = make_run(sft={"max_steps": 2}, model=model)
    train_sft(ready.run, ready.config, ready.console)
    weights = load_file(ready.run.adapter("sft") / WEIGHTS_FILE)
    assert {w.dtype for w in weights.values()} == {torch.float32}


def test_dora_and_checkpointed_activations_train_too(make_run: MakeRun) -> None:
    lora = {"r": 4, "dora": True, "rslora": True, "targets": ["q_proj", "v_proj"]}
    ready = make_run(sft={"max_steps": 2, "activation_checkpointing": True, "lora": lora})
    assert train_sft(ready.run, ready.config, ready.console)["steps"] == 2


def test_labels_stand_on_the_answer_alone(make_run: MakeRun) -> None:
    ready = make_run()
    rows = sft_rows(ready.run, ready.config, ready.chat)
    row = rows.train.dataset[0]
    learnt = [i for i, label in zip(row["input_ids"], row["labels"], strict=True)
              if label != IGNORED]  # fmt: skip
    assert learnt == [label for label in row["labels"] if label != IGNORED]
    assert learnt[-1] == ready.chat.end_token_id
    assert ready.chat.tokenizer.decode(learnt[:-1]).startswith("Please consult")

    everything = parse_config(
        {**ready.config.model_dump(), "sft": {**ready.config.sft.model_dump(), "loss_on": "all"}}
    )
    row = sft_rows(ready.run, everything, ready.chat).train.dataset[0]
    assert row["labels"] == row["input_ids"]


def test_long_rows_are_cut_and_counted(make_run: MakeRun) -> None:
    whole = sft_rows(*_without_console(make_run("whole")))
    longest = max(len(ids) for ids in whole.train.dataset["input_ids"])
    cut = sft_rows(*_without_console(make_run("cut", sft={"max_length": longest - 2})))
    assert 0 < cut.counts.cut_rows <= 48
    assert max(len(ids) for ids in cut.train.dataset["input_ids"]) == longest - 2


def test_nothing_to_learn_from_is_one_clear_message(make_run: MakeRun) -> None:
    ready = make_run(sft={"max_length": 8})
    with pytest.raises(DataError, match="48 rows end before their answer"):
        train_sft(ready.run, ready.config, ready.console)


def test_training_that_changes_nothing_is_an_error(make_run: MakeRun) -> None:
    ready = make_run(sft={"max_steps": 1, "warmup_ratio": 0.5})
    with pytest.raises(MedtrainError, match="left the adapter as it was"):
        train_sft(ready.run, ready.config, ready.console)
    assert not ready.run.adapter("sft").exists()


def test_a_loss_that_is_no_number_is_an_error(make_run: MakeRun) -> None:
    ready = make_run(sft={"learning_rate": 1e30, "warmup_ratio": 0, "max_grad_norm": 1e30})
    with pytest.raises(MedtrainError, match=r"have become no numbers, up to step"):
        train_sft(ready.run, ready.config, ready.console)


def test_too_little_memory_is_one_clear_message(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    ready = make_run()
    monkeypatch.setattr(SupervisedTrainer, "training_step", exhausted)
    with pytest.raises(ConfigError, match="too little memory") as caught:
        train_sft(ready.run, ready.config, ready.console)
    assert "sft.batch_size (now 8)" in caught.value.fix


def test_a_full_disk_is_one_clear_message(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    ready = make_run()
    monkeypatch.setattr(SupervisedTrainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(TryAgainError, match="disk is full"):
        train_sft(ready.run, ready.config, ready.console)


def test_the_best_checkpoint_is_kept_and_training_stops_early(make_run: MakeRun) -> None:
    """A learning rate that overshoots: the first evaluations are the best."""
    wild = {"learning_rate": 0.3, "scheduler": "constant", "evals_per_epoch": 4, "epochs": 5,
            "early_stopping": 2, "batch_size": 4, "max_grad_norm": 100.0}  # fmt: skip
    ready = make_run(sft=wild)
    counts = train_sft(ready.run, ready.config, ready.console)
    evaluated = {line["step"]: line["loss"] for line in read_jsonl(ready.run.metrics("sft"))
                 if line["kind"] == "eval"}  # fmt: skip
    best = min(evaluated, key=lambda step: (evaluated[step], step))
    assert counts["kept_step"] == best
    assert counts["steps"] < make_plan(ready.config.sft, counts["train_rows"], "ddp").max_steps
    assert [step for step in evaluated if step > best] == sorted(evaluated)[-2:]
    kept = ready.run.checkpoints("sft") / f"checkpoint-{best}" / WEIGHTS_FILE
    assert kept.read_bytes() == (ready.run.adapter("sft") / WEIGHTS_FILE).read_bytes()


def test_the_last_checkpoint_is_kept_when_asked(make_run: MakeRun) -> None:
    ready = make_run(sft={"max_steps": 3, "evals_per_epoch": 0, "keep_best": False})
    assert train_sft(ready.run, ready.config, ready.console)["kept_step"] == 3


def test_optimisers_are_checked_and_replaced_where_they_cannot_work(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = make_run(sft={"optimizer": "paged_adamw_8bit"})
    assert optimizer(ready) == "adamw_torch"
    assert "event=optimizer_replaced" in ready.run.log.read_text()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert optimizer(ready, "fsdp2") == "adamw_torch"
    assert "FSDP2 shards" in ready.run.log.read_text()
    typo = make_run("typo", sft={"optimizer": "adamw_torhc"})
    with pytest.raises(ConfigError, match="Did you mean 'adamw_torch'"):
        optimizer(typo)


def optimizer(ready: Ready, strategy: str = "ddp") -> str:
    plan = make_plan(ready.config.sft, 8, strategy)
    return choose_optimizer(ready.run, ready.config, "sft", plan, ready.console)


def on_a_gpu_of(monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    properties = SimpleNamespace(total_memory=int(gib * 2**30))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: True)


def test_moments_in_32_bits_unless_only_8_fit(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = make_run(model={"quantization": "nf4"}, sft={"batch_size": 1})
    assert optimizer(ready) == "adamw_torch"
    on_a_gpu_of(monkeypatch, 80)
    assert optimizer(ready) == "adamw_torch_fused"
    assert optimizer(ready, "zero2") == "adamw_torch"
    architecture = architecture_of(ready.config)
    tried = [
        min(e.peak for e in tried_estimates(ready.config, "sft", 1, architecture, 2, name))
        for name in ("paged_adamw_8bit", "adamw_torch_fused")
    ]
    on_a_gpu_of(monkeypatch, sum(tried) / 2 / 2**30)
    assert optimizer(ready) == "paged_adamw_8bit"


def test_trainer_fields_are_passed_on_or_refused(make_run: MakeRun) -> None:
    ready = make_run(sft={"trainer": {"adam_beta2": 0.95}, "warmup_ratio": 0.25})
    passed = settings(ready, Plan(40, 10, 8, 1))
    assert passed.adam_beta2 == 0.95
    assert passed.warmup_steps == 10
    bad = make_run("bad", sft={"trainer": {"logging_strategy": "sometimes"}})
    with pytest.raises(ConfigError, match="refuses the settings of sft"):
        settings(bad, Plan(40, 10, 8, 1))


def test_settings_that_only_the_trainer_refuses_are_one_clear_message(make_run: MakeRun) -> None:
    ready = make_run(sft={"trainer": {"loss_type": "dft2"}})
    with pytest.raises(ConfigError, match=r"refuses the settings of sft: .*loss_type"):
        train_sft(ready.run, ready.config, ready.console)


def test_early_stopping_without_a_validation_row_is_warned_of(make_run: MakeRun) -> None:
    ready = make_run(sft={"early_stopping": 2})
    settings(ready, Plan(4, 2, 8, 1), validated=False)
    assert "event=early_stopping_off" in ready.run.log.read_text()


@pytest.mark.parametrize(
    ("rows", "options", "plan"),
    [
        (100, {"batch_size": 8, "epochs": 2}, Plan(26, 13, 8, 1)),
        (100, {"batch_size": 8, "epochs": 2, "gradient_accumulation": 4}, Plan(8, 4, 32, 1)),
        (100, {"batch_size": 8, "epochs": 0.5}, Plan(7, 13, 8, 1)),
        (3, {"batch_size": 8, "max_steps": 5}, Plan(5, 1, 8, 1)),
    ],
)
def test_the_plan_counts_steps_as_the_trainer_does(
    make_run: MakeRun, rows: int, options: dict[str, Any], plan: Plan
) -> None:
    assert make_plan(make_run(sft=options).config.sft, rows, "ddp") == plan


def test_metrics_keep_the_figures_of_both_kinds() -> None:
    train = metrics_line({"loss": 1.5, "num_tokens": 12.0, "epoch": 0.123456, "other": 1}, 3)
    assert train == {"step": 3, "epoch": 0.1235, "kind": "train", "loss": 1.5, "tokens": 12}
    evaluated = metrics_line({"eval_loss": 2.0, "eval_rewards/margins": 0.5, "epoch": 1.0}, 4)
    assert evaluated == {"step": 4, "epoch": 1.0, "kind": "eval", "loss": 2.0,
                         "rewards_margin": 0.5}  # fmt: skip
    assert metrics_line({"train_runtime": 3.0, "train_loss": 1.0}, 5) is None


def test_telemetry_stops_on_a_loss_that_is_no_number() -> None:
    class State:
        global_step = 7

    with Console(quiet=True).progress("sft", 10) as progress:
        telemetry = Telemetry(None, progress)
        with pytest.raises(MedtrainError, match="nan at step 7"):
            telemetry.on_log(None, State(), None, {"loss": math.nan, "epoch": 1.0})


@given(st.lists(st.floats(0, 10, allow_nan=False), max_size=12))
def test_patience_counts_evaluations_after_the_best(losses: list[float]) -> None:
    history: list[dict[str, Any]] = [
        {"step": 2 * i, "eval_loss": loss} for i, loss in enumerate(losses, start=1)
    ]
    history += [{"step": 1, "loss": 0.0}, {"step": 0, "eval_loss": -1.0}]
    best = best_step(history)
    if not losses:
        assert best is None
        assert evaluations_since_best(history) == 0
    else:
        position = losses.index(min(losses)) + 1
        assert best == 2 * position
        assert evaluations_since_best(history) == len(losses) - position


@given(st.text(), st.floats(0, 0.4), st.floats(0, 0.1))
def test_validation_rows_stay_when_the_share_grows(key: str, share: float, more: float) -> None:
    assert not is_validation(key, 0.0)
    if is_validation(key, share):
        assert is_validation(key, share + more)


def test_the_metrics_are_json_lines(make_run: MakeRun) -> None:
    ready = make_run(sft={"max_steps": 2})
    train_sft(ready.run, ready.config, ready.console)
    lines = ready.run.metrics("sft").read_text().splitlines()
    assert all(json.loads(line)["kind"] in {"train", "eval"} for line in lines)


def test_trackers_get_what_the_metrics_file_gets(make_run: MakeRun) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    ready = make_run(sft={"max_steps": 4}, train={"trackers": ["tensorboard"]})
    train_sft(ready.run, ready.config, ready.console)
    (events,) = (ready.run.logs / "tensorboard" / "sft").rglob("events.*")
    seen = EventAccumulator(str(events))
    seen.Reload()
    lines = [line for line in read_jsonl(ready.run.metrics("sft")) if line["kind"] == "train"]
    for theirs, ours in (("train/loss", "loss"), ("train/tokens_per_s", "tokens_per_s")):
        assert [event.value for event in seen.Scalars(theirs)] == pytest.approx(
            [line[ours] for line in lines], rel=1e-5
        )


def test_a_tracker_that_is_not_installed_is_named(make_run: MakeRun) -> None:
    missing = [name for name in ("mlflow", "wandb", "trackio") if not find_spec(name)]
    if not missing:
        pytest.skip("every tracker is installed here")
    ready = make_run(train={"trackers": missing[:1]})
    with pytest.raises(ConfigError, match=f"{missing[0]} is not installed"):
        train_sft(ready.run, ready.config, ready.console)


def _without_console(ready: Ready) -> tuple[Any, Any, Any]:
    return ready.run, ready.config, ready.chat
