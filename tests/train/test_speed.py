"""Tokens, padding and the share of a GPU's arithmetic are counted as they are named."""

from __future__ import annotations

import time
from typing import Any

import pytest

from medtrain.files import read_jsonl
from medtrain.train import fit, speed
from medtrain.train.loader import Forward, supervised_batch
from medtrain.train.model import load_base
from medtrain.train.speed import SpeedMeter
from tests.train.conftest import MakeRun
from tests.train.training import train

_LENGTHS = (10, 4, 6)


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(speed.time, "perf_counter", lambda: self.now)

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def forward(*, packed: bool, counted: bool = True) -> Forward:
    rows = [{"input_ids": [1] * n, "labels": [1] * n} for n in _LENGTHS]
    places = tuple(range(len(rows))) if counted else ()
    return Forward(supervised_batch(0, packed=packed)(rows), places)


def test_tokens_are_counted_without_padding(clock: Clock) -> None:
    meter = SpeedMeter(1.0, 1, None)
    meter.computed(forward(packed=False))
    meter.computed(forward(packed=False))
    meter.step_done()
    clock.pass_by(4.0)
    line = meter.line()
    assert line["tokens_per_s"] == 2 * 20 / 4
    assert line["padding"] == round(1 - 20 / 30, 4)
    assert line["step_s"] == 4.0
    assert "mfu" not in line


def test_packed_rows_have_no_padding(clock: Clock) -> None:
    meter = SpeedMeter(1.0, 1, None)
    meter.computed(forward(packed=True))
    meter.step_done()
    clock.pass_by(2.0)
    line = meter.line()
    assert (line["tokens_per_s"], line["padding"]) == (10.0, 0.0)


def test_a_forward_pass_that_only_takes_part_is_padding(clock: Clock) -> None:
    meter = SpeedMeter(1.0, 1, None)
    meter.computed(forward(packed=True))
    meter.computed(forward(packed=True, counted=False))
    meter.step_done()
    clock.pass_by(1.0)
    line = meter.line()
    assert (line["tokens_per_s"], line["padding"]) == (20.0, 0.5)


def test_a_frozen_weight_costs_four_flops_a_token(clock: Clock) -> None:
    """Two forward, two for the gradient of its inputs; of one device, not of all."""
    meter = SpeedMeter(8e9, 4, 312e12)
    meter.computed(forward(packed=True))
    meter.step_done()
    clock.pass_by(0.01)
    line = meter.line()
    assert line["tokens_per_s"] == 2000 * 4
    assert line["mfu"] == round(4 * 8e9 * 2000 / 312e12, 4) == 0.2051


def test_evaluating_and_saving_are_left_out_and_waiting_is_shown(clock: Clock) -> None:
    meter = SpeedMeter(1.0, 1, None)
    for _ in range(2):
        meter.waited(0.25)
        meter.computed(forward(packed=True))
        clock.pass_by(1.0)
        meter.step_done()
        clock.pass_by(30.0)
        meter.paused(30.0)
    line = meter.line()
    assert line["step_s"] == 1.0
    assert line["data_wait_s"] == 0.25
    assert line["tokens_per_s"] == 20.0
    assert line["memory_peak_bytes"] > 10 * 2**20


def test_a_line_begins_where_the_last_one_ended(clock: Clock) -> None:
    meter = SpeedMeter(1.0, 1, None)
    meter.computed(forward(packed=True))
    meter.step_done()
    clock.pass_by(1.0)
    meter.line()
    assert meter.line() == {}, "no step, no figures"
    meter.computed(forward(packed=True))
    meter.step_done()
    clock.pass_by(4.0)
    assert meter.line()["tokens_per_s"] == 5.0


@pytest.mark.parametrize("packing", [True, False])
def test_metrics_show_the_padding(make_run: MakeRun, packing: bool) -> None:
    ready = make_run(sft={"max_steps": 4, "packing": packing})
    train(ready, "sft")
    lines = [line for line in read_jsonl(ready.run.metrics("sft")) if line["kind"] == "train"]
    assert lines
    for line in lines:
        assert {"tokens_per_s", "step_s", "data_wait_s", "memory_peak_bytes"} <= line.keys()
        assert line["padding"] == 0 if packing else 0 < line["padding"] < 0.5


def test_time_for_evaluating_and_saving_is_no_time_of_a_step(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour passes in every evaluation."""
    from medtrain.train.step import StepTrainer

    gone = 0.0
    real, evaluate = time.perf_counter, StepTrainer.evaluation_loop

    def slow(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal gone
        gone += 3600
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(StepTrainer, "evaluation_loop", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: real() + gone)
    ready = make_run(sft={"max_steps": 8, "log_every": 2, "evals_per_epoch": 2})
    train(ready, "sft")
    lines = [line for line in read_jsonl(ready.run.metrics("sft")) if line["kind"] == "train"]
    assert gone >= 2 * 3600
    assert all(line["step_s"] < 600 for line in lines)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_weights_are_counted_whole_whatever_they_are_stored_in(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, quantization: str
) -> None:
    counted: list[float] = []

    class Counting(SpeedMeter):
        def __init__(self, weights: float, *args: Any) -> None:
            counted.append(weights)
            super().__init__(weights, *args)

    monkeypatch.setattr(fit, "SpeedMeter", Counting)
    ready = make_run(sft={"max_steps": 1, "warmup_ratio": 0}, model={"quantization": quantization})
    adapter = train(ready, "sft")["trainable_parameters"]
    plain = load_base(ready.run, ready.config, ready.chat, quantized=False)
    layers = (
        sum(p.numel() for p in plain.model.layers.parameters()) + plain.model.norm.weight.numel()
    )
    assert layers <= counted[0] <= layers + adapter
