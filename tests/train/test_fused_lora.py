"""Which layers are computed together, which take PEFT's path; a model stays what it was."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, LlamaConfig, Phi3Config, Qwen2Config
from transformers.models.auto import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from medtrain.config import RunConfig, parse_config
from medtrain.config.lora_path import why_not_fused
from medtrain.errors import ConfigError
from medtrain.launch.strategy import refuse
from medtrain.train.adapter import write_adapter
from medtrain.train.fused_lora import fuse, fuse_where_it_fits
from tests.train.conftest import MakeRun
from tests.train.lora_block import (
    Block,
    Shape,
    TwoReaders,
    adapted,
    assert_close,
    both,
    computed,
    gradients,
    step,
    train_a_while,
    x_of,
)
from tests.train.training import losses, train

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize("quantized", [False, True])
def test_a_model_that_reads_two_tensors_is_computed_layer_by_layer(quantized: bool) -> None:
    shape = Shape(quantized=quantized)
    plain, fused = both(TwoReaders, shape)
    together = []
    for _ in range(3):
        with computed() as sizes:
            assert_close(step(fused, x_of(shape)), step(plain, x_of(shape)))
        together.append(sizes)
    assert together[1:] == [[1, 1, 1, 1]] * 2


def test_layers_that_read_one_tensor_are_computed_once() -> None:
    shape = Shape()
    _, fused = both(Block, shape)
    with computed() as sizes:
        fused(x_of(shape))
    assert sizes == [3, 1]


def test_a_pass_that_was_left_in_the_middle_does_no_harm() -> None:
    shape = Shape()
    plain, fused = both(Block, shape)
    step(fused, x_of(shape))
    inner = fused.base_model.model
    abandoned = x_of(shape, 7)
    inner.q_proj(abandoned)
    with computed() as sizes:
        assert_close(step(fused, x_of(shape)), step(plain, x_of(shape)))
    assert sizes == [3, 1]


def test_a_tensor_changed_between_two_calls_is_read_again() -> None:
    shape = Shape()
    plain, fused = both(Block, shape)
    found = []
    for model in (plain, fused):
        inner, x = model.base_model.model, x_of(shape)
        with torch.no_grad():
            inner.q_proj(x)
            found.append(inner.k_proj(x.mul_(2)))
    assert torch.allclose(found[0], found[1], atol=1e-6)


def test_a_disabled_a_merged_and_a_second_adapter_take_pefts_path() -> None:
    shape = Shape()
    plain, fused = both(Block, shape)
    x = x_of(shape)
    for model in (plain, fused):
        torch.manual_seed(4)
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
        train_a_while(model)
    usual = plain(x)
    for active in ("second", ["default", "second"]):
        for model in (plain, fused):
            model.base_model.set_adapter(active)
        with computed() as sizes:
            assert torch.equal(fused(x), plain(x))
        assert not sizes
    with plain.disable_adapter(), fused.disable_adapter():
        assert torch.equal(fused(x), plain(x))
    for model in (plain, fused):
        model.set_adapter("default")
        model.merge_adapter()
    assert torch.equal(fused(x), plain(x))
    for model in (plain, fused):
        model.unmerge_adapter()
        model.delete_adapter("second")
    with computed() as sizes:
        assert torch.allclose(fused(x), usual, atol=1e-5)
    assert sizes == [3, 1]


@pytest.mark.parametrize(
    ("options", "why"),
    [({"use_dora": True}, "Dora"), ({"lora_bias": True}, "bias")],
)
def test_what_does_not_fit_is_named(options: dict[str, Any], why: str) -> None:
    shape = Shape(bias=True)
    model = adapted(Block(shape), shape, **options)
    before = model(x_of(shape))
    result = fuse(model)
    assert result.layers == 0
    assert len(result.plain) == 4
    assert all(why in reason for reason in result.plain.values())
    assert torch.equal(model(x_of(shape)), before)


def test_a_base_that_is_trained_takes_pefts_path() -> None:
    model = adapted(Block(Shape()))
    model.base_model.model.k_proj.base_layer.weight.requires_grad_()
    assert list(fuse(model).plain) == ["base_model.model.k_proj"]


_WITHOUT_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MODELS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "phi3": lambda: Phi3Config(**SIZES, pad_token_id=0),
    "gpt2": lambda: GPT2Config(
        vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, **_WITHOUT_DROPOUT
    ),
}


def causal(kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[kind](), attn_implementation="sdpa")
    add_fused_lm_head(model)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    model = get_peft_model(model, lora)
    train_a_while(model)
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("kind", "layers"), [("llama", 14), ("qwen2", 14), ("phi3", 8), ("gpt2", 0)]
)
def test_whole_models_learn_the_same(kind: str, layers: int, checkpointing: bool) -> None:
    plain = causal(kind)
    fused = copy.deepcopy(plain)
    assert fuse(fused).layers == layers
    ids = torch.randint(0, 96, (2, 20), generator=torch.Generator().manual_seed(1))
    found = []
    for model in (fused, plain):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        loss = model.train()(input_ids=ids, labels=ids, fused_lm_head=True, use_cache=False).loss
        loss.backward()
        found.append({"loss": loss.detach(), **gradients(model)})
    assert_close(found[0], found[1], 2e-5)


def test_what_is_saved_and_merged_is_the_same(tmp_path: Path) -> None:
    plain = causal("llama")
    fused = copy.deepcopy(plain)
    fuse(fused)
    assert fused.state_dict().keys() == plain.state_dict().keys()
    for name, model in (("plain", plain), ("fused", fused)):
        write_adapter(model, tmp_path / name)
    for file in (tmp_path / "plain").iterdir():
        assert file.read_bytes() == (tmp_path / "fused" / file.name).read_bytes()
    ids = torch.arange(12)[None]
    logits = fused.eval()(ids).logits
    merged = fused.merge_and_unload()
    assert torch.allclose(merged(ids).logits, logits, atol=1e-5)
    for name, weight in plain.merge_and_unload().state_dict().items():
        assert torch.equal(merged.state_dict()[name], weight)


def test_a_copy_of_a_fused_model_is_a_model_of_its_own() -> None:
    shape = Shape()
    _, fused = both(Block, shape)
    other = copy.deepcopy(fused)
    with torch.no_grad():
        for name, parameter in fused.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    assert not torch.allclose(other(x_of(shape)), fused(x_of(shape)))
    torch.save(fused, io.BytesIO())


_RUN = {
    "name": "run",
    "model": {"base": "builtin:tiny"},
    "data": {"sources": [{"adapter": "table", "path": "rows.jsonl"}]},
}


@pytest.mark.parametrize(
    ("settings", "strategy", "why"),
    [
        ({"sft": {"lora": {"dora": True}}}, "auto", "dora"),
        ({"train": {"compile": True}}, "ddp", "compile"),
        ({}, "zero3", "zero3"),
        ({}, "fsdp2", "fsdp2"),
    ],
)
def test_settings_that_speak_against_it(settings: dict[str, Any], strategy: str, why: str) -> None:
    def config(wanted: Any) -> RunConfig:
        train = {**settings.get("train", {}), "fused_lora": wanted}
        return parse_config({**_RUN, **settings, "train": train})

    assert why in (why_not_fused(config("auto"), strategy) or "")
    assert why_not_fused(config(False), strategy) == "train.fused_lora is false"
    with pytest.raises(ConfigError, match=f"fused_lora=true is not possible: .*{why}"):
        why_not_fused(config(True), strategy)
    with pytest.raises(ConfigError, match=f"fused_lora=true is not possible: .*{why}"):
        refuse(strategy, config(True), on_gpu=True)


def test_a_run_learns_the_same_with_and_without(make_run: MakeRun) -> None:
    curves = []
    for wanted in (True, False):
        learnt = {"lora": {"r": 4, "alpha": 8, "dropout": 0.0}, "epochs": 1}
        ready = make_run(f"fused-{wanted}", train={"fused_lora": wanted}, rows=24, sft=learnt)
        train(ready, "sft")
        curves.append(losses(ready.run, "sft"))
        log = ready.run.log.read_text()
        said = "by=fused layers=14 " if wanted else "by=peft reason="
        assert f"event=lora stage=sft {said}" in log
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)


def test_a_layer_that_does_not_fit_is_refused_where_it_must(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = parse_config({**_RUN, "train": {"fused_lora": True}})
    with pytest.raises(ConfigError, match="Conv1D"):
        fuse_where_it_fits(causal("gpt2"), config, "ddp")
