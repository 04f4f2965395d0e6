"""The estimate's own logic: what grows with what, and what strategies share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medtrain.config import LoraConfig, RunConfig, parse_config
from medtrain.memory import Architecture, Estimate, Work, estimate, work_of
from medtrain.memory.estimate import base_bytes, trained_parameters

LLAMA_8B = Architecture(4096, 14_336, 32, 32, 8, 128, 128_256)
STRATEGIES = ("ddp", "zero2", "zero3", "zero3-offload", "fsdp2")
WORK = Work(
    tokens=2048,
    evaluated_tokens=8192,
    dtype_bytes=2,
    quantized=True,
    double_quantization=True,
    lora=LoraConfig(r=16, alpha=32, dropout=0.05, targets="all-linear"),
    state_bytes=2,
    new_rows=False,
)


def config_of(**sections: Any) -> RunConfig:
    source = {"adapter": "table", "path": "rows.jsonl"}
    tree = {"name": "t", "model": {"base": "meta-llama/Meta-Llama-3-8B"},
            "data": {"sources": [source]}}  # fmt: skip
    return parse_config({**tree, **{k: {**tree.get(k, {}), **v} for k, v in sections.items()}})


def test_llama_3_8b_in_four_bits() -> None:
    stored, constants = base_bytes(LLAMA_8B, WORK)
    linear = 32 * (4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14_336)
    others = 8_030_261_248 - linear
    assert stored == linear / 2 + 2 * others
    # 0.127 bits a weight, as the QLoRA paper has it for double quantisation, section 3.
    assert constants * 8 / linear == pytest.approx(0.127, abs=0.001)
    single = replace(WORK, double_quantization=False)
    assert base_bytes(LLAMA_8B, single)[1] * 8 / linear == 0.5
    plain = replace(WORK, quantized=False)
    assert base_bytes(LLAMA_8B, plain) == (2 * 8_030_261_248, 0)


def test_adapters_of_llama_3_8b() -> None:
    # As PEFT's print_trainable_parameters says it for r=16.
    assert trained_parameters(LLAMA_8B, WORK) == 41_943_040
    few = replace(WORK, lora=LoraConfig(r=16, targets=["q_proj", "v_proj"]))
    assert trained_parameters(LLAMA_8B, few) == 6_815_744
    path = replace(WORK, lora=LoraConfig(r=16, targets=["self_attn.q_proj", "self_attn.v_proj"]))
    assert trained_parameters(LLAMA_8B, path) == 6_815_744


@given(
    tokens=st.integers(1, 10**5),
    more=st.integers(0, 10**5),
    strategy=st.sampled_from(STRATEGIES),
    gpus=st.integers(1, 64),
    checkpointing=st.booleans(),
)
def test_more_tokens_never_take_less(
    tokens: int, more: int, strategy: Any, gpus: int, checkpointing: bool
) -> None:
    def peak(count: int) -> float:
        work = replace(WORK, tokens=count)
        return estimate(LLAMA_8B, work, strategy, gpus=gpus, checkpointing=checkpointing).peak

    assert peak(tokens) <= peak(tokens + more)


@given(gpus=st.integers(2, 512), strategy=st.sampled_from(STRATEGIES))
def test_more_gpus_never_take_more_of_each(gpus: int, strategy: Any) -> None:
    def resident(count: int) -> float:
        return estimate(LLAMA_8B, WORK, strategy, gpus=count).resident

    assert resident(gpus + 1) <= resident(gpus)


@given(tokens=st.integers(256, 10**5))
def test_checkpointing_takes_less(tokens: int) -> None:
    work = replace(WORK, tokens=tokens, evaluated_tokens=0)
    with_it = estimate(LLAMA_8B, work, checkpointing=True)
    assert with_it.peak < estimate(LLAMA_8B, work).peak


def parts(strategy: Any, gpus: int = 8, *, checkpointing: bool = False) -> Estimate:
    return estimate(LLAMA_8B, WORK, strategy, gpus=gpus, checkpointing=checkpointing)


def test_each_strategy_shares_what_it_should() -> None:
    whole = parts("ddp")
    assert parts("zero2").weights == whole.weights
    assert parts("zero2").optimizer < whole.optimizer
    stored, constants = base_bytes(LLAMA_8B, WORK)
    assert parts("zero3").weights == parts("fsdp2").weights == stored / 8 + constants
    assert parts("zero3-offload").weights == constants
    assert parts("zero3-offload").adapter == 0
    assert parts("zero3").gathered == stored, "4-bit layers keep what they were computed with"
    assert 0 < parts("zero3", checkpointing=True).gathered < stored
    assert whole.gathered == 0
    for strategy in STRATEGIES:
        assert parts(strategy).activations == whole.activations, "nothing shards activations"


def test_the_base_is_loaded_whole_wherever_it_goes_later() -> None:
    stored, constants = base_bytes(LLAMA_8B, WORK)
    for strategy in STRATEGIES:
        assert parts(strategy, gpus=64).load > stored + constants
    plain = replace(WORK, quantized=False)
    whole = 2 * 8_030_261_248
    for strategy in STRATEGIES:
        assert estimate(LLAMA_8B, plain, strategy, gpus=64).load > whole


def test_new_tokens_cost_a_gradient_of_the_whole_output_layer() -> None:
    grown = estimate(LLAMA_8B, replace(WORK, new_rows=True))
    matrix = 128_256 * 4096
    assert grown.new_rows == matrix * (2 + 4 + 2)
    assert grown.allocated - estimate(LLAMA_8B, WORK).allocated > 0.9 * grown.new_rows


def test_a_wide_evaluation_counts() -> None:
    narrow = estimate(LLAMA_8B, replace(WORK, evaluated_tokens=0), checkpointing=True)
    wide = estimate(LLAMA_8B, replace(WORK, evaluated_tokens=10**6), checkpointing=True)
    assert wide.allocated > 2 * narrow.allocated
    assert wide.activations == narrow.activations


def test_the_work_of_a_stage() -> None:
    config = config_of(
        model={"dtype": "bfloat16"},
        sft={"batch_size": 3, "max_length": 100, "eval_batch_size": 5},
        dpo={"batch_size": 3, "max_length": 100, "validation_fraction": 0},
    )
    sft, dpo = (work_of(config, stage, LLAMA_8B) for stage in ("sft", "dpo"))
    assert (sft.tokens, sft.evaluated_tokens) == (300, 500)
    assert (dpo.tokens, dpo.evaluated_tokens) == (600, 0)
    assert (sft.dtype_bytes, sft.state_bytes, sft.new_rows) == (2, 8, True)
    assert (sft.lora.dropout, dpo.lora.dropout) == (0.05, 0.0), "TRL switches it off"
    chosen_only = config_of(dpo={"batch_size": 3, "max_length": 100, "method": "rejection"})
    fine_tuned = work_of(chosen_only, "dpo", LLAMA_8B)
    assert (fine_tuned.tokens, fine_tuned.lora.dropout) == (300, 0.05)


def test_dtype_and_optimiser_are_those_of_the_configuration() -> None:
    assert work_of(config_of(), "sft", LLAMA_8B, auto_bytes=4).dtype_bytes == 4
    plain = config_of(model={"quantization": "none", "dtype": "float32"})
    assert work_of(plain, "sft", LLAMA_8B).dtype_bytes == 4
    assert work_of(plain, "sft", LLAMA_8B).state_bytes == 8
    named = config_of(sft={"optimizer": "paged_adamw_8bit"})
    assert work_of(named, "sft", LLAMA_8B).state_bytes == 2
    assert work_of(named, "sft", LLAMA_8B, device="cpu").state_bytes == 8
    assert work_of(config_of(), "sft", LLAMA_8B, device="cpu").state_bytes == 8
    own = config_of(model={"chat_template": "llama-2"})
    assert not work_of(own, "sft", LLAMA_8B).new_rows
    assert not work_of(config_of(), "sft", replace(LLAMA_8B, knows_chatml=True)).new_rows


def test_the_json_has_every_part_and_the_peak() -> None:
    tree = parts("zero3").to_json()
    assert {"weights", "adapter", "optimizer", "activations", "logits", "load", "peak"} <= set(tree)
    assert tree["peak"] == round(parts("zero3").peak)
