"""Steps that the host learns of late do what steps do that it waits for, bad ones included."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from medtrain.errors import MedtrainError
from medtrain.train.adapter_trainer import AdapterTrainer
from medtrain.train.ahead import LAG, Ahead, can_leave_out, watch
from medtrain.train.guard import LossGuard
from medtrain.train.reference import compute_reference
from medtrain.train.speed import SpeedMeter
from medtrain.train.telemetry import Telemetry
from medtrain.train.trainers import SupervisedTrainer
from tests.train.conftest import MakeRun, Ready, adapter_bytes
from tests.train.test_guard import (
    finite,
    infinite_gradient,
    no_number,
    row_of_step,
    spoilt,
)
from tests.train.training import metrics, stopped_at, train
from tests.train.waits import waits_counted

_CPU = torch.device("cpu")
_SFT: dict[str, Any] = {"epochs": 2, "batch_size": 1, "gradient_accumulation": 4,
    "evals_per_epoch": 0, "log_every": 2, "max_length": 64, "optimizer": "adamw_torch_fused",
    "lora": {"r": 4, "dropout": 0.1}}  # fmt: skip


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the host runs ahead, and a thread reads."""
    monkeypatch.setattr("medtrain.train.ahead.DEVICES", ("cpu",))
    monkeypatch.setattr("medtrain.train.step._READ_AHEAD_FOR", ("cpu",))


def rounded(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {name: pytest.approx(value, rel=1e-6) if isinstance(value, float) else value
         for name, value in line.items()}
        for line in lines
    ]  # fmt: skip


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_it_changes_nothing_where_nothing_is_bad(
    make_dpo_run: MakeRun, request: pytest.FixtureRequest, stage: Any
) -> None:
    options = {"sft": _SFT, "dpo": {"optimizer": "adamw_torch_fused"}}
    waiting, running = make_dpo_run("waiting", **options), make_dpo_run("running", **options)
    train(waiting, stage)
    request.getfixturevalue("ahead")
    train(running, stage)
    assert adapter_bytes(running.run, stage) == adapter_bytes(waiting.run, stage)
    assert rounded(metrics(running.run, stage)) == metrics(waiting.run, stage)


def test_processes_that_read_and_the_thread_that_reads_from_them_change_nothing(
    make_run: MakeRun, ahead: None
) -> None:
    options = {**_SFT, "max_steps": 5}
    alone, helped = (
        make_run(f"workers-{workers}", sft={**options, "trainer": {
            "dataloader_num_workers": workers}})
        for workers in (0, 1)
    )  # fmt: skip
    for ready in (alone, helped):
        train(ready, "sft")
    assert adapter_bytes(helped.run, "sft") == adapter_bytes(alone.run, "sft")


def weights_by_step(monkeypatch: pytest.MonkeyPatch) -> dict[int, torch.Tensor]:
    """Fill a dictionary with all trained weights after each step."""
    found: dict[int, torch.Tensor] = {}

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trained = [p.detach().flatten() for p in kwargs["model"].parameters() if p.requires_grad]
        found[state.global_step] = torch.cat(trained).clone()

    monkeypatch.setattr(Telemetry, "on_step_end", on_step_end)
    return found


@pytest.mark.parametrize("spoil", [no_number, infinite_gradient])
def test_a_step_without_a_loss_or_gradient_is_left_out_whole(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, ahead: None, spoil: Any
) -> None:
    ready = make_run(sft={**_SFT, "epochs": 1, "log_every": 1})
    row, _ = row_of_step(ready, 4)
    spoilt(monkeypatch, row, spoil)
    weights = weights_by_step(monkeypatch)
    train(ready, "sft")
    assert finite(ready, "sft")
    same = [step for step in weights if step > 1 and torch.equal(weights[step], weights[step - 1])]
    assert same == [4]
    lines = {line["step"]: line for line in metrics(ready.run, "sft") if line["kind"] == "train"}
    assert "grad_norm" not in lines[4]
    assert (lines[4]["loss"] == 0) == (spoil is no_number)
    assert lines[5]["loss"] > 0
    assert lines[5]["grad_norm"] > 0


def test_what_is_left_out_is_no_part_of_a_line(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, ahead: None
) -> None:
    ready = make_run(sft={**_SFT, "epochs": 1, "log_every": 1})
    row, _ = row_of_step(ready, 4)
    spoilt(monkeypatch, row, no_number)
    train(ready, "sft")
    lines = {line["step"]: line for line in metrics(ready.run, "sft") if line["kind"] == "train"}
    assert lines[4]["tokens"] == lines[3]["tokens"], "it has not been learnt"
    assert lines[5]["token_accuracy"] > 0


def test_more_than_allowed_stop_the_training_and_name_the_step_and_its_rows(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, ahead: None
) -> None:
    ready = make_run(sft={**_SFT, "max_bad_batches": 1})
    row, row_id = row_of_step(ready, 2)
    spoilt(monkeypatch, row, no_number)
    with pytest.raises(MedtrainError, match=r"no number in 2 steps of sft, up to step") as caught:
        train(ready, "sft")
    assert row_id in str(caught.value)
    assert not ready.run.adapter("sft").exists()


def test_losses_that_were_never_numbers_are_said_to_be_so(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, ahead: None
) -> None:
    ready = make_run(sft=_SFT)
    original = SupervisedTrainer.computed

    def computed(self: Any, *args: Any) -> Any:
        made = original(self, *args)
        return made._replace(loss=made.loss * math.nan)

    monkeypatch.setattr(SupervisedTrainer, "computed", computed)
    with pytest.raises(MedtrainError, match="first losses of sft are no numbers"):
        train(ready, "sft")


def test_broken_weights_are_told_from_bad_rows() -> None:
    guard = guard_of(3)
    step = [(5, math.nan, 1.0)]
    with pytest.raises(MedtrainError, match="weights of sft have become no numbers"):
        learn(guard, step, whole=lambda: False)


def test_an_explosion_is_counted(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, ahead: None
) -> None:
    ready = make_run(sft={**_SFT, "epochs": 3, "max_bad_batches": 1})
    row, row_id = row_of_step(ready, 2)
    spoilt(monkeypatch, row, lambda loss: loss * 200.0)
    with pytest.raises(MedtrainError, match=r"over 10 times the usual in 2 steps") as caught:
        train(ready, "sft")
    assert row_id in str(caught.value)


@pytest.mark.parametrize("spoil", [no_number, infinite_gradient])
def test_stopped_and_resumed_it_is_as_patient_and_ends_with_the_same_bytes(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, ahead: None, spoil: Any
) -> None:
    """The checkpoint knows of the bad step just before it, of which nobody had heard."""
    options = {**_SFT, "log_every": 7, "max_bad_batches": 2}
    whole, stopped = make_run("whole", sft=options), make_run("stopped", sft=options)
    row, _ = row_of_step(whole, 3)
    spoilt(monkeypatch, row, spoil)
    train(whole, "sft")
    stopped_at(stopped, "sft", monkeypatch, 3)
    sums = json.loads(next(stopped.run.checkpoints("sft").glob("*/sums_0.json")).read_text())
    assert sums["guard"]["bad"] == 1
    train(stopped, "sft")
    assert adapter_bytes(stopped.run, "sft") == adapter_bytes(whole.run, "sft")
    assert metrics(stopped.run, "sft") == metrics(whole.run, "sft")


# Alone


def guard_of(allowed: int) -> LossGuard:
    return LossGuard("sft", [f"row{i}" for i in range(40)], allowed, _CPU)


def learn(
    guard: LossGuard,
    steps: list[tuple[int, float, float]],
    whole: Callable[[], bool] = lambda: True,
) -> None:
    runner = Ahead(torch.optim.AdamW([torch.zeros(1)], fused=True), _CPU, 1)
    for step, loss, norm in steps:
        runner.loss(torch.tensor(loss), asked=False)
        runner.launch(torch.tensor(norm), [step], step)
    watch(runner.known(all_of_them=True), guard, whole)


def test_steps_are_known_in_order_and_once_after_the_lag() -> None:
    runner = Ahead(torch.optim.AdamW([torch.zeros(1)], fused=True), _CPU, 1)
    known: list[list[int]] = []
    for step in range(1, 7):
        runner.loss(torch.tensor(1.0), asked=step == 2)
        runner.launch(torch.tensor(1.0), [step], step)
        known.append([each.step for each in runner.known()])
    assert known == [[]] * LAG + [[step] for step in range(1, 7 - LAG)]
    assert [each.step for each in runner.known(all_of_them=True)] == [5, 6]
    assert runner.known(all_of_them=True) == []


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.inf), (math.inf, math.nan)])
def test_a_fused_optimiser_leaves_a_step_out_on_the_device(loss: float, norm: float) -> None:
    """Weights, moments and the count of steps stay as they were; the next step is as usual."""
    left_out, usual = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizers = [torch.optim.AdamW([p], lr=0.1, fused=True) for p in (left_out, usual)]
    assert can_leave_out(optimizers[0])
    runner = Ahead(optimizers[0], _CPU, 1)
    for number in range(4):
        bad = number in (0, 2)
        for p, optimizer in zip((left_out, usual), optimizers, strict=True):
            p.grad = torch.full((3,), math.nan if bad else float(number))
            if p is left_out:
                runner.loss(torch.tensor(loss if bad else 1.0), asked=False)
                runner.launch(torch.tensor(norm if bad else 1.0), [], number)
                optimizer.step()
            elif not bad:
                optimizer.step()
    assert torch.equal(left_out, usual)
    assert not can_leave_out(torch.optim.AdamW([left_out]))


def test_what_was_a_number_and_what_was_not_is_counted_apart() -> None:
    guard = guard_of(2)
    learn(guard, [(1, 1.0, 1.0), (2, math.nan, 1.0), (3, 1.0, math.inf)])
    assert guard.bad == 2
    with pytest.raises(MedtrainError, match=r"row2, row3, row4") as caught:
        learn(guard, [(4, 1.0, math.nan)])
    assert "The gradient was no number in 3 steps of sft, up to step 4" in str(caught.value)


def _ask_alone(process: int, store: str, answers: Any) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=process, world_size=2
    )
    runner = Ahead(torch.optim.AdamW([torch.zeros(1)], fused=True), _CPU, 2)
    for step in range(1, 7):
        good = runner.loss(torch.tensor(float(process)), asked=process == 1 and step == 2)
        assert bool(good)
        runner.launch(torch.tensor(1.0), [], step)
        for each in runner.known():
            assert each.loss == 0.5
            if each.asked:
                answers.put((process, each.step, step))
    torch.distributed.destroy_process_group()


def test_one_process_that_is_told_to_stop_tells_all_of_them_at_the_same_step(
    tmp_path: Any,
) -> None:
    context = torch.multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    torch.multiprocessing.spawn(_ask_alone, (str(tmp_path / "store"), answers), nprocs=2)
    heard = sorted(answers.get() for _ in range(2))
    assert heard == [(0, 2, 2 + LAG), (1, 2, 2 + LAG)]


def test_the_thread_is_gone_when_training_ends(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, ahead: None
) -> None:
    import threading

    def reading() -> list[str]:
        return [t.name for t in threading.enumerate() if t.name.startswith("medtrain-reading")]

    ready: Ready = make_run(sft={**_SFT, "max_bad_batches": 0})
    stopped_at(ready, "sft", monkeypatch, 3)
    assert not reading()
    row, _ = row_of_step(ready, 5)
    spoilt(monkeypatch, row, no_number)
    with pytest.raises(MedtrainError):
        train(ready, "sft")
    assert not reading()


@pytest.mark.parametrize("method", ["sft", "dpo", "orpo", "kto"])
def test_nothing_is_read_in_a_step_between_lines(
    make_dpo_run: MakeRun, monkeypatch: pytest.MonkeyPatch, ahead: None, method: str
) -> None:
    """Passes, clipping and the optimiser; on a GPU each reading would wait for all of them."""
    stage: Any = "sft" if method == "sft" else "dpo"
    section = {"optimizer": "adamw_torch_fused", "max_steps": 4, "log_every": 4,
               "gradient_accumulation": 2, "evals_per_epoch": 0}  # fmt: skip
    ready = make_dpo_run(**{stage: {**section, **({"method": method} if stage == "dpo" else {})}})
    if method == "kto":
        compute_reference(*ready)
    seen: list[str] = []

    def watched(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with waits_counted() as waits:
                result = original(*args, **kwargs)
            seen.extend(waits)
            return result

        return call

    for owner, name in (
        (AdapterTrainer, "training_step"),
        (AdapterTrainer, "_get_grad_norm"),
        (torch.optim.AdamW, "step"),
    ):
        monkeypatch.setattr(owner, name, watched(getattr(owner, name)))
    # It counts tokens that are still on the host.
    monkeypatch.setattr(SpeedMeter, "computed", lambda meter, forward: None)
    monkeypatch.setattr(SpeedMeter, "line", lambda meter: {})
    monkeypatch.setattr("trl.trainer.utils._use_triton", lambda device: True)
    train(ready, stage)
    assert not seen
