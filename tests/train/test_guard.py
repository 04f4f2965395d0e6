"""A loss or a gradient that is no number is left out a few times, and then named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from medtrain.errors import MedtrainError
from medtrain.run import Trained
from medtrain.train import dpo
from medtrain.train.adapter import WEIGHTS_FILE
from medtrain.train.batches import BatchPlan
from medtrain.train.guard import LossGuard
from medtrain.train.losses.computed import Computed
from medtrain.train.reference import read_reference
from medtrain.train.rows import dpo_rows, sft_rows
from medtrain.train.step import StepTrainer
from medtrain.train.trainers import SupervisedTrainer
from tests.train.conftest import MakeRun, Ready, adapter_bytes
from tests.train.training import metrics, stopped_at, train

_CPU = torch.device("cpu")
_SECTION = {"epochs": 2, "batch_size": 1, "gradient_accumulation": 4, "evals_per_epoch": 0,
            "log_every": 2}  # fmt: skip
_SFT: dict[str, Any] = {**_SECTION, "max_length": 64, "lora": {"r": 4, "dropout": 0.1}}
_EPOCH = 11
"""Steps that the rows make."""
Spoil = Callable[[torch.Tensor], torch.Tensor]


def no_number(loss: torch.Tensor) -> torch.Tensor:
    return loss * math.nan


def nothing(loss: torch.Tensor) -> torch.Tensor:
    return loss * 0.0


def infinite_gradient(loss: torch.Tensor) -> torch.Tensor:
    """The loss as it is, but where it changes it changes without bounds."""
    loss.register_hook(lambda gradient: gradient * math.inf)
    return loss


def spoilt(monkeypatch: pytest.MonkeyPatch, row: dict[str, Any], spoil: Spoil) -> None:
    """Spoil the loss of every forward pass in training that has a row."""
    ids = torch.tensor(row["input_ids"])
    original = SupervisedTrainer.computed

    def has_it(inputs: Any) -> bool:
        found = inputs["input_ids"][:, : len(ids)]
        return found.shape[1] == len(ids) and bool((found == ids).all(dim=1).any())

    def computed(self: Any, model: Any, inputs: Any, items: Any) -> Computed:
        made = original(self, model, inputs, items)
        bad = has_it(inputs) and self.model.training
        return made._replace(loss=spoil(made.loss)) if bad else made

    monkeypatch.setattr(SupervisedTrainer, "computed", computed)


def row_of_step(ready: Ready, step: int) -> tuple[dict[str, Any], str]:
    """A row that the first epoch's step (counted from 1) computes last, and its id."""
    rows = sft_rows(ready.run, ready.config, ready.chat).train
    plan = BatchPlan(rows.lengths, 4, 1, 1, 64, ready.config.seed)
    place = plan.deal(plan.rows_of(0, step - 1))[0][-1][-1]
    return rows.dataset[place], rows.ids[place]


def finite(ready: Ready, stage: Trained) -> bool:
    weights = load_file(ready.run.adapter(stage) / WEIGHTS_FILE)
    return all(bool(torch.isfinite(weight).all()) for weight in weights.values())


@pytest.mark.parametrize("step", [1, 4])
def test_a_loss_that_is_no_number_is_left_out(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """As if its forward pass had no loss: dropout, metrics and weights do not notice it."""
    left_out, zero = make_run("left-out", sft=_SFT), make_run("zero", sft=_SFT)
    row, _ = row_of_step(left_out, step)
    for ready, spoil in ((left_out, no_number), (zero, nothing)):
        with monkeypatch.context() as patched:
            spoilt(patched, row, spoil)
            assert train(ready, "sft")["steps"] == 2 * _EPOCH
    assert finite(left_out, "sft")
    assert adapter_bytes(left_out.run, "sft") == adapter_bytes(zero.run, "sft")
    theirs, ours = (metrics(ready.run, "sft") for ready in (zero, left_out))
    assert [line["loss"] for line in ours] == [line["loss"] for line in theirs]
    assert ours[-1]["tokens"] < theirs[-1]["tokens"], "what was left out has not been learnt"


def test_the_very_first_loss_may_be_left_out(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = make_run(sft={**_SFT, "batch_size": 4, "gradient_accumulation": 1, "max_steps": 3})
    row, _ = row_of_step(ready, 1)
    spoilt(monkeypatch, row, no_number)
    assert train(ready, "sft")["steps"] == 3
    assert finite(ready, "sft")


def test_a_pair_whose_loss_is_no_number_is_left_out(
    make_dpo_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rewards are no numbers either, and would make all means of the line so."""
    ready = make_dpo_run(dpo={**_SECTION, "epochs": 1, "packing": False})
    bad = dpo_rows(ready.run, ready.config, ready.chat).train.ids[20]

    def spoilt_reference(*args: Any) -> dict[str, tuple[float, float]]:
        return {**read_reference(*args), bad: (math.nan, -1.0)}

    monkeypatch.setattr(dpo, "read_reference", spoilt_reference)
    assert train(ready, "dpo")["steps"] == 10
    assert finite(ready, "dpo")
    lines = [line for line in metrics(ready.run, "dpo") if line["kind"] == "train"]
    assert len(lines) == 5
    assert all(
        {"rewards_margin", "rewards_chosen", "logps_chosen"} <= line.keys() for line in lines
    )


def test_more_than_allowed_stop_the_training_and_name_the_rows(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = make_run(sft={**_SFT, "max_bad_batches": 1})
    row, row_id = row_of_step(ready, 2)
    spoilt(monkeypatch, row, no_number)
    with pytest.raises(MedtrainError, match=r"no number in 2 batches of sft") as caught:
        train(ready, "sft")
    assert row_id in str(caught.value)
    assert caught.value.exit_code == 70
    assert not ready.run.adapter("sft").exists()


@pytest.mark.parametrize("spoil", [no_number, infinite_gradient])
def test_patience_does_not_begin_anew_on_resume(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, spoil: Spoil
) -> None:
    whole = make_run("whole", sft={**_SFT, "max_bad_batches": 1})
    stopped = make_run("stopped", sft={**_SFT, "max_bad_batches": 1})
    row, _ = row_of_step(whole, 2)
    spoilt(monkeypatch, row, spoil)
    with pytest.raises(MedtrainError) as expected:
        train(whole, "sft")
    stopped_at(stopped, "sft", monkeypatch, 3)
    with pytest.raises(MedtrainError) as found:
        train(stopped, "sft")
    assert str(found.value) == str(expected.value)


def test_resumed_just_before_a_bad_batch_it_ends_with_the_same_bytes(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**_SFT, "batch_size": 4, "gradient_accumulation": 1, "epochs": 1}
    whole, stopped = make_run("whole", sft=options), make_run("stopped", sft=options)
    row, _ = row_of_step(whole, 4)
    spoilt(monkeypatch, row, no_number)
    train(whole, "sft")
    stopped_at(stopped, "sft", monkeypatch, 3)
    train(stopped, "sft")
    assert adapter_bytes(stopped.run, "sft") == adapter_bytes(whole.run, "sft")
    assert metrics(stopped.run, "sft") == metrics(whole.run, "sft")


def test_a_gradient_that_is_no_number_leaves_its_step_out(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = make_run(sft={**_SFT, "epochs": 1, "log_every": 1})
    row, row_id = row_of_step(ready, 4)
    spoilt(monkeypatch, row, infinite_gradient)
    assert train(ready, "sft")["steps"] == _EPOCH
    assert finite(ready, "sft")
    lines = {line["step"]: line for line in metrics(ready.run, "sft") if line["kind"] == "train"}
    assert "grad_norm" not in lines[4], "there is none"
    assert lines[5]["grad_norm"] > 0

    strict = make_run("strict", sft={**_SFT, "max_bad_batches": 0})
    with pytest.raises(MedtrainError, match=r"gradient was no number in 1 step of") as caught:
        train(strict, "sft")
    assert row_id in str(caught.value)


def test_a_loss_that_explodes_too_often_stops_the_training(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step is far off and is learnt from, for it may be right; the second is too many."""
    ready = make_run(sft={**_SFT, "epochs": 3, "max_bad_batches": 1})
    row, row_id = row_of_step(ready, 2)
    spoilt(monkeypatch, row, lambda loss: loss * 200.0)
    with pytest.raises(MedtrainError, match=r"over 10 times the usual in 2 steps") as caught:
        train(ready, "sft")
    assert row_id in str(caught.value)


# The guard alone


def guard_of(allowed: int = 2) -> LossGuard:
    return LossGuard("sft", [f"row{i}" for i in range(40)], allowed, _CPU)


def test_nothing_explodes_while_it_warms_up_or_drifts() -> None:
    guard = guard_of(0)
    for step, loss in enumerate([50.0, 1.0, 30.0, 2.0], start=1):
        guard.step_done(loss, [0], step)
    for step in range(5, 200):
        guard.step_done(2.0 * 1.02**step, [0], step)
    assert guard.bad == 0


def test_losses_near_zero_may_jump_by_less_than_one() -> None:
    """DPO's loss becomes tiny: ten times of it says nothing."""
    guard = guard_of(0)
    for step in range(1, 30):
        guard.step_done(0.001, [0], step)
    guard.step_done(0.9, [1], 30)
    with pytest.raises(MedtrainError, match="row2"):
        guard.step_done(1.1, [2], 31)


def test_an_explosion_does_not_become_the_usual() -> None:
    guard = guard_of(3)
    for step in range(1, 21):
        guard.step_done(1.0, [0], step)
    for step in range(21, 24):
        guard.step_done(1000.0, [step], step)
    assert guard.bad == 3
    with pytest.raises(MedtrainError, match="row21, row22, row23, row24") as caught:
        guard.step_done(1000.0, [24], 24)
    assert "in 4 steps, up to step 24" in str(caught.value)


def test_many_rows_are_named_in_part() -> None:
    guard = guard_of(0)
    with pytest.raises(MedtrainError, match=r"row15 and 4 more") as caught:
        guard.bad_gradient(range(20), 1)
    assert "row16" not in str(caught.value)


def test_what_a_checkpoint_keeps_of_it_is_all_of_it() -> None:
    one, other = guard_of(), guard_of()
    for step in range(1, 15):
        one.step_done(1.0 + step, [0], step)
    one.bad_gradient([3, 4], 15)
    other.restore(json.loads(json.dumps(one.sums())))
    assert other.sums() == one.sums()
    other.bad_gradient([5], 16)
    with pytest.raises(MedtrainError, match="row3, row4, row5, row6"):
        other.bad_gradient([6], 17)


def test_weights_that_are_no_numbers_are_told_from_bad_rows() -> None:
    nan = torch.tensor(math.nan)
    with pytest.raises(MedtrainError, match="weights of sft have become no numbers"):
        guard_of().checked(nan, [0], lambda: nan, 5)
    with pytest.raises(MedtrainError, match="first losses of sft are no numbers"):
        guard_of().checked(nan, [0], lambda: nan, 1)


class _Scaler:
    def __init__(self, scale: float) -> None:
        self.get_scale = lambda: scale


class _Clips:
    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> torch.Tensor:
        return torch.tensor(math.inf)


@pytest.mark.parametrize(("scale", "bad"), [(65536.0, 0), (1.0, 1)])
def test_overflows_that_a_scaler_looks_for_are_not_bad(scale: float, bad: int) -> None:
    """float16 begins with losses scaled so far that gradients overflow."""

    class Trainer(StepTrainer, _Clips):
        def __init__(self) -> None:
            scaler = _Scaler(scale)
            self.accelerator = type("A", (), {"scaler": scaler, "distributed_type": "NO"})()
            self.args = type("A", (), {"fp16": True})()
            self.state = type("S", (), {"global_step": 0})()
            self.optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
            self.guard = guard_of()
            self._rows_of_step = [0]
            self._ahead = None

    trainer = Trainer()
    trainer._get_grad_norm(None)
    assert trainer.guard.bad == bad
