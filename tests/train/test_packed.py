"""Rows side by side in one sequence give what each of them gives alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    StableLmConfig,
)
from trl.trainer.utils import add_fused_lm_head

from medtrain.attention.families import FAMILIES, why_not_packed
from medtrain.attention.packed import PACKED_ATTENTION, attention_for, window_of
from medtrain.config import parse_config
from medtrain.errors import ConfigError, MedtrainError
from medtrain.train.loader import preference_batch, supervised_batch
from medtrain.train.model import packs
from medtrain.train.packed import PackedForward, select_supervised
from medtrain.train.rows import IGNORED
from tests.train.conftest import MakeRun, Ready
from tests.train.training import losses, train

_VOCAB, _PAD, _WINDOW = 96, 0, 24
_PACKED = PACKED_ATTENTION["auto"]
_SIZES = {"vocab_size": _VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
          "num_attention_heads": 4, "max_position_embeddings": 128}  # fmt: skip
_MODELS: dict[str, Callable[[], Any]] = {
    "tied": lambda: LlamaConfig(**_SIZES, num_key_value_heads=4, tie_word_embeddings=True),
    "grouped": lambda: LlamaConfig(**_SIZES, num_key_value_heads=2),
    "one-head-biased": lambda: LlamaConfig(
        **_SIZES, num_key_value_heads=1, attention_bias=True, mlp_bias=True
    ),
    "biased-qwen": lambda: Qwen2Config(**_SIZES, num_key_value_heads=2),
    "sliding-window": lambda: MistralConfig(
        **_SIZES, num_key_value_heads=2, sliding_window=_WINDOW
    ),
}
_ALL = pytest.mark.parametrize("kind", _MODELS)
Row = dict[str, list[int]]


@cache
def plain_model(kind: str) -> Any:
    """As transformers builds it: nothing of ours, nothing of TRL's."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_MODELS[kind](), attn_implementation="sdpa")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return _with_adapter(model).eval()


@cache
def packed_model(kind: str) -> Any:
    """The same weights as they are trained."""
    model = AutoModelForCausalLM.from_config(_MODELS[kind](), attn_implementation=_PACKED)
    model = _with_adapter(model)
    model.load_state_dict(plain_model(kind).state_dict())
    add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))
    select_supervised(model.get_base_model().base_model)
    return model.eval()


def _with_adapter(model: Any) -> Any:
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"])
    model = get_peft_model(model, adapter)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return model


def row_of(length: int, prompt: int, seed: int = 0) -> Row:
    drawn = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, _VOCAB, (length,), generator=drawn).tolist()
    return {"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]}


def rows_of(lengths: Sequence[int]) -> list[Row]:
    return [row_of(length, prompt=length // 2, seed=i) for i, length in enumerate(lengths)]


def forward(model: Any, rows: list[Row], *, packed: bool) -> Any:
    inputs = supervised_batch(_PAD, packed=packed)(rows)
    return PackedForward(model)(**inputs, fused_lm_head=True, use_cache=False)


def alone(model: Any, row: Row) -> torch.Tensor:
    """Log probabilities of a row's tokens from whole logits; 0 where a label is ignored."""
    ids = torch.tensor(row["input_ids"])
    labels = torch.tensor(row["labels"])[1:]
    log_probs = model(ids[None]).logits[0, :-1].log_softmax(-1)
    chosen: torch.Tensor = log_probs.gather(1, ids[1:, None])[:, 0]
    return chosen * (labels != IGNORED)


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=5)


@_ALL
@settings(max_examples=8)
@given(lengths=LENGTHS)
def test_packed_rows_are_as_likely_as_each_alone(kind: str, lengths: list[int]) -> None:
    rows = rows_of(lengths)
    with torch.no_grad():
        packed = forward(packed_model(kind), rows, packed=True)
        padded = forward(packed_model(kind), rows, packed=False)
        for place, row in enumerate(rows):
            expected = alone(plain_model(kind), row)
            end = len(expected)
            torch.testing.assert_close(packed.log_probs[place, :end], expected, atol=1e-5, rtol=0)
            assert not packed.log_probs[place, end:].any()
    torch.testing.assert_close(packed.log_probs, padded.log_probs, atol=1e-5, rtol=0)
    assert torch.equal(packed.label_mask, padded.label_mask)
    assert torch.equal(packed.is_top1.bool(), padded.is_top1.bool())
    torch.testing.assert_close(
        packed.entropy * packed.label_mask, padded.entropy * padded.label_mask, atol=1e-4, rtol=0
    )


@_ALL
def test_gradients_are_those_of_the_rows_alone(kind: str) -> None:
    rows = rows_of([30, 3, 17, 2, 25])
    plain = plain_model(kind)
    expected = gradients(plain, torch.cat([alone(plain, row) for row in rows]).sum())
    for packed in (True, False):
        loss = forward(packed_model(kind), rows, packed=packed).log_probs.sum()
        found = gradients(packed_model(kind), loss)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert gradient.any()
            torch.testing.assert_close(found[name], gradient, atol=1e-4, rtol=1e-4)


@_ALL
def test_a_neighbour_changes_nothing(kind: str) -> None:
    """Not even the last digit: no number of one row enters another's."""
    rows = rows_of([12, 20, 9])
    others = [row_of(12, 6, seed=7), rows[1], row_of(9, 4, seed=8)]
    with torch.no_grad():
        first, second = (forward(packed_model(kind), r, packed=True) for r in (rows, others))
    assert torch.equal(first.log_probs[1], second.log_probs[1])
    assert not torch.equal(first.log_probs[0], second.log_probs[0])


def test_a_row_does_notice_its_own_tokens() -> None:
    rows = rows_of([12, 20])
    first_token, *others = rows[1]["input_ids"]
    changed = {**rows[1], "input_ids": [first_token % 90 + 1, *others]}
    with torch.no_grad():
        first = forward(packed_model("grouped"), rows, packed=True)
        second = forward(packed_model("grouped"), [rows[0], changed], packed=True)
    assert (first.log_probs[1][10:19] - second.log_probs[1][10:19]).abs().min() > 0


@settings(max_examples=20)
@given(st.lists(st.tuples(*[st.integers(1, 12)] * 3), min_size=1, max_size=4))
def test_both_sides_of_a_pair_are_as_likely_as_padded(sizes: list[tuple[int, int, int]]) -> None:
    rows = [
        {"prompt_ids": row_of(p, 0, 1)["input_ids"], "chosen_ids": row_of(c, 0, 2)["input_ids"],
         "rejected_ids": row_of(r, 0, 3)["input_ids"]}
        for p, c, r in sizes
    ]  # fmt: skip
    sums = []
    with torch.no_grad():
        for packed in (True, False):
            inputs = preference_batch(_PAD, packed=packed)(rows)
            answers = inputs.pop("completion_mask")
            labels = inputs["input_ids"].masked_fill(answers == 0, IGNORED)
            outputs = PackedForward(packed_model("grouped"))(
                **inputs, labels=labels, fused_lm_head=True, use_cache=False
            )
            assert torch.equal(outputs.label_mask.bool(), answers[:, 1:].bool())
            sums.append(outputs.log_probs.sum(dim=1))
    torch.testing.assert_close(sums[0], sums[1], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_rows_without_a_loss_give_a_zero_that_can_be_differentiated(packed: bool) -> None:
    """What a process computes that only takes part in the others' communication."""
    model = packed_model("grouped")
    silent = [{"input_ids": [5, 6], "labels": [IGNORED] * 2}]
    outputs = forward(model, silent, packed=packed)
    assert not outputs.label_mask.any()
    loss = outputs.log_probs.sum()
    assert loss.item() == 0
    found = gradients(model, loss)
    assert not any(gradient.any() for gradient in found.values())


def test_a_first_token_is_predicted_from_nothing() -> None:
    """`loss_on: all` labels it, and no token before it may be taken for its predictor."""
    rows = rows_of([8, 5])
    rows[1]["labels"] = list(rows[1]["input_ids"])
    with torch.no_grad():
        outputs = forward(packed_model("grouped"), rows, packed=True)
        expected = alone(plain_model("grouped"), rows[1])
    torch.testing.assert_close(outputs.log_probs[1, :4], expected, atol=1e-5, rtol=0)
    assert int(outputs.label_mask[1].sum()) == 4


# Which models are packed


@cache
def of_family(family: str, implementation: str) -> Any:
    """A small model with random weights; families with an attention window have a short one."""
    sizes = {**_SIZES, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    config = AutoConfig.for_model(family, **sizes)
    if hasattr(config, "sliding_window"):
        config = AutoConfig.for_model(
            family, **sizes, sliding_window=_WINDOW, use_sliding_window=True, max_window_layers=0
        )
        assert window_of(config) == _WINDOW
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    return _with_adapter(model).eval()


def packed_family(family: str) -> Any:
    model = of_family(family, _PACKED)
    if not hasattr(model, "prepared"):
        add_fused_lm_head(model.get_base_model())
        select_supervised(model.get_base_model().base_model)
        model.prepared = True
    return model


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_on_the_list_keeps_rows_apart(family: str) -> None:
    """Rows longer than the attention window too, and in gradients."""
    rows = rows_of([30, 3, 40, 2, 8])
    model, plain = packed_family(family), of_family(family, "sdpa")
    expected = [alone(plain, row) for row in rows]
    found = forward(model, rows, packed=True).log_probs
    for place, each in enumerate(expected):
        torch.testing.assert_close(found[place, : len(each)], each, atol=1e-5, rtol=1e-5)
    ours, theirs = gradients(model, found.sum()), gradients(plain, torch.cat(expected).sum())
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=2e-4, rtol=1e-3)


def test_a_model_that_loses_the_borders_is_an_error() -> None:
    """StableLM's layers hand no keyword arguments on to their attention."""
    config = StableLmConfig(**_SIZES, num_key_value_heads=2)
    model = _with_adapter(AutoModelForCausalLM.from_config(config, attn_implementation=_PACKED))
    add_fused_lm_head(model.get_base_model())
    with pytest.raises(MedtrainError, match="StableLmAttention was given packed rows without"):
        forward(model, rows_of([12, 20]), packed=True)
    # Padded, it is as right as ever.
    padded = forward(model.eval(), rows_of([12, 20]), packed=False)
    assert padded.log_probs.isfinite().all()


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LlamaConfig(), None),
        (MistralConfig(sliding_window=64), None),
        (Qwen2Config(sliding_window=64, use_sliding_window=True), None),
        (LlamaConfig(attention_dropout=0.1), "its attention drops out"),
        (StableLmConfig(), "stablelm is not known to keep rows apart"),
        (SimpleNamespace(model_type="mamba"), "mamba is not known to keep rows apart"),
    ],
)
def test_a_model_that_cannot_keep_rows_apart_is_told(config: Any, reason: str | None) -> None:
    why = why_not_packed(config)
    assert why == reason or (reason is not None and why is not None and reason in why)


def test_attention_is_chosen_for_what_is_computed() -> None:
    assert attention_for("auto", packed=False) is None
    assert attention_for("eager", packed=False) == "eager"
    assert attention_for("auto", packed=True) == "medtrain_packed"
    assert attention_for("sdpa", packed=True) == "medtrain_packed_sdpa"
    assert attention_for("flash_attention_2", packed=True) == "medtrain_packed_flash"


@pytest.fixture
def dropping_out(make_run: MakeRun, base_dir: Path, tmp_path: Path) -> Callable[..., Ready]:
    """A run whose base drops some of its attention."""
    base = tmp_path / "mistral"
    shutil.copytree(base_dir, base)
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, attention_dropout=0.1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    return lambda **sft: make_run(base=base, sft={"max_steps": 2, **sft})


def test_what_cannot_be_packed_is_refused_where_it_was_asked_for(
    dropping_out: Callable[..., Ready],
) -> None:
    ready = dropping_out(packing=True)
    with pytest.raises(ConfigError, match=r"sft\.packing is not possible: its attention") as caught:
        train(ready, "sft")
    assert "sft.packing=auto" in caught.value.fix


def test_what_cannot_be_packed_is_padded_otherwise(dropping_out: Callable[..., Ready]) -> None:
    ready = dropping_out()
    assert not packs(ready.run, ready.config, "sft")
    assert train(ready, "sft")["steps"] == 2


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, True), ({"packing": False}, False), ({"attention": "eager"}, False),
     ({"attention": "sdpa"}, True)],
)  # fmt: skip
def test_settings_say_what_is_packed(
    make_run: MakeRun, changes: dict[str, Any], expected: bool
) -> None:
    ready = make_run()
    tree = ready.config.model_dump()
    if "attention" in changes:
        tree["model"]["attention"] = changes.pop("attention")
    tree["sft"].update(changes)
    assert packs(ready.run, parse_config(tree), "sft") == expected


def test_checkpointed_activations_change_nothing(make_run: MakeRun) -> None:
    runs = []
    for checkpointing in (False, True):
        sft = {"max_steps": 3, "log_every": 1, "packing": True,
               "activation_checkpointing": checkpointing}  # fmt: skip
        runs.append(make_run(f"checkpointing-{checkpointing}", sft=sft))
        train(runs[-1], "sft")
    first, second = (losses(ready.run, "sft") for ready in runs)
    assert first == pytest.approx(second, abs=1e-6)
    assert len(first) == 3
