"""`train.strategy: auto` takes the cheapest that fits, and says why."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medtrain.memory import (
    Architecture,
    Choice,
    choose_strategy,
    choose_under,
    estimate,
    work_of,
)
from medtrain.memory.choose import CHEAPEST_FIRST, COUNTED_ON, strategies_for
from medtrain.memory.work import FUSED, PAGED
from tests.memory.test_estimate import LLAMA_8B, config_of

GIB = 2**30
LLAMA_70B = Architecture(8192, 28_672, 80, 64, 8, 128, 128_256)
PLAIN = {"quantization": "none", "dtype": "bfloat16"}


def choice(
    gib: float, gpus: int = 8, architecture: Any = LLAMA_8B, stage: str = "sft", **sections: Any
) -> Choice:
    return choose_strategy(
        config_of(**sections), stage, gpus=gpus, gpu_bytes=int(gib * GIB), architecture=architecture
    )


def test_the_cheapest_that_fits() -> None:
    assert (choice(80).strategy, choice(80).checkpointing) == ("ddp", False)
    small = choice(24)
    assert (small.strategy, small.checkpointing, small.fits) == ("ddp", True, True)
    assert "ddp with activation checkpointing needs" in small.reason
    assert "ddp would need" in small.reason
    sharded = choice(45, 8, LLAMA_70B)
    assert (sharded.strategy, sharded.fits) == ("zero3", True)
    assert not choice(79, 8, LLAMA_70B, model=PLAIN).fits, "it is loaded whole before it is sharded"


@given(gib=st.floats(4, 200), gpus=st.integers(1, 64), stage=st.sampled_from(["sft", "dpo"]))
def test_nothing_cheaper_would_have_fitted(gib: float, gpus: int, stage: str) -> None:
    chosen = choice(gib, gpus, stage=stage, **{stage: {"optimizer": FUSED}})
    work = work_of(config_of(), stage, LLAMA_8B)
    ways = [
        (strategy, way)
        for strategy in (CHEAPEST_FIRST if gpus > 1 else CHEAPEST_FIRST[:1])
        for way in (False, True)
    ]
    peaks = {
        (strategy, way): estimate(LLAMA_8B, work, strategy, gpus=gpus, checkpointing=way).peak
        for strategy, way in ways
    }
    fitting = [way for way, peak in peaks.items() if peak <= int(gib * GIB)]
    with_room = [way for way in fitting if peaks[way] <= COUNTED_ON * int(gib * GIB)]
    assert chosen.fits == bool(fitting)
    if fitting:
        assert (chosen.strategy, chosen.checkpointing) == (with_room or fitting)[0]
    else:
        assert ": " in chosen.reason


def test_one_gpu_has_nobody_to_share_with() -> None:
    chosen = choice(5, gpus=1)
    assert (chosen.strategy, chosen.fits) == ("ddp", False)


@pytest.mark.parametrize(
    ("sections", "gib", "remedy"),
    [
        ({"sft": {"batch_size": 64}}, 20, "halve sft.batch_size (now 64)"),
        (
            {"sft": {"batch_size": 1, "eval_batch_size": 1, "max_length": 60_000}},
            20,
            "lower sft.max_length (now 60000)",
        ),
        ({"sft": {"eval_batch_size": 256}}, 20, "lower sft.eval_batch_size (now 256)"),
        ({"sft": {"activation_checkpointing": False}}, 20, "sft.activation_checkpointing=auto"),
        ({"model": PLAIN}, 12, "or a smaller base"),
        ({}, 5, "take GPUs with more memory"),
    ],
)
def test_what_does_not_fit_says_what_to_change(
    sections: dict[str, Any], gib: float, remedy: str
) -> None:
    chosen = choice(gib, gpus=1, **sections)
    assert not chosen.fits
    assert remedy in chosen.reason


def test_what_is_set_is_kept() -> None:
    set_one = choice(80, train={"strategy": "zero3"})
    assert (set_one.strategy, set_one.fits) == ("zero3", True)
    too_small = choice(5, train={"strategy": "zero2"})
    assert (too_small.strategy, too_small.fits) == ("zero2", False)
    slow = choice(80, sft={"activation_checkpointing": True})
    assert (slow.strategy, slow.checkpointing) == ("ddp", True)


@given(gib=st.floats(8, 90), gpus=st.integers(1, 8))
def test_a_worker_comes_to_the_launchers_answer(gib: float, gpus: int) -> None:
    chosen = choice(gib, gpus)
    config, size = config_of(), int(gib * GIB)
    known = choose_under(
        config, "sft", chosen.strategy, gpus=gpus, gpu_bytes=size, architecture=LLAMA_8B
    )
    assert known.checkpointing == chosen.checkpointing
    assert known.optimizer == chosen.optimizer
    config = config_of(sft={"activation_checkpointing": False})
    assert not choose_under(
        config, "sft", "ddp", gpus=gpus, gpu_bytes=size, architecture=LLAMA_8B
    ).checkpointing


def test_moments_are_in_8_bits_only_where_nothing_else_fits() -> None:
    assert choice(80, gpus=1).optimizer == FUSED
    by_size = {gib / 20: choice(gib / 20, gpus=1) for gib in range(200, 600)}
    fitting = {gib: one for gib, one in by_size.items() if one.fits}
    assert {one.optimizer for one in fitting.values()} == {FUSED, PAGED}
    work = work_of(config_of(), "sft", LLAMA_8B, optimizer=FUSED)
    for gib, one in fitting.items():
        same = estimate(LLAMA_8B, work, one.strategy, gpus=1, checkpointing=one.checkpointing)
        assert one.optimizer == FUSED or same.peak > COUNTED_ON * gib * GIB
    assert choice(10, gpus=1, sft={"optimizer": FUSED}).optimizer == FUSED
    assert choice(80, gpus=1, model=PLAIN).optimizer == FUSED


def test_where_nobody_can_tell_nothing_is_sharded() -> None:
    unknown = choice(80, architecture=None)
    assert (unknown.strategy, unknown.checkpointing, unknown.fits) == ("ddp", True, True)
    assert unknown.estimate is None
    cpu = choice(0, gpus=0)
    assert (cpu.strategy, cpu.checkpointing, cpu.fits) == ("ddp", False, True)
    assert choice(80, architecture=None, train={"strategy": "zero3"}).strategy == "zero3"


def test_every_strategy_can_be_shown() -> None:
    work = replace(work_of(config_of(), "sft", LLAMA_8B), new_rows=False)
    shown = strategies_for(LLAMA_8B, work, gpus=8, gpu_bytes=24 * GIB, checkpointing="auto")
    assert [one.strategy for one in shown] == [*CHEAPEST_FIRST, "fsdp2"]
    for one in shown:
        without = estimate(LLAMA_8B, work, one.strategy, gpus=8)
        assert one.checkpointing == (without.peak > 24 * GIB)
    tokens = strategies_for(
        LLAMA_8B, replace(work, new_rows=True), gpus=8, gpu_bytes=24 * GIB, checkpointing="auto"
    )
    assert [one.strategy for one in tokens] == [*CHEAPEST_FIRST], "FSDP2 trains no new tokens"
    alone = strategies_for(LLAMA_8B, work, gpus=1, gpu_bytes=24 * GIB, checkpointing=False)
    assert [one.strategy for one in alone] == ["ddp"]
