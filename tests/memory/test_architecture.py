"""A base's sizes: exact, without loading it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from medtrain.config import parse_config
from medtrain.memory import Architecture, architecture_of
from medtrain.memory.architecture import from_config

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama-biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-size": ("LlamaConfig", {"head_dim": 24}),
    "mistral": ("MistralConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "smollm3": ("SmolLM3Config", {}),
}
SIZES = {
    "vocab_size": 512, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def of_base(base: str | Path, **model: Any) -> Architecture | None:
    source = {"adapter": "table", "path": "rows.jsonl"}
    tree = {"name": "t", "model": {"base": str(base), **model}, "data": {"sources": [source]}}
    return architecture_of(parse_config(tree))


def known(base: str) -> Architecture:
    found = of_base(base)
    assert found is not None, base
    return found


@pytest.mark.parametrize("name", KINDS)
def test_parameters_are_those_of_the_model_that_transformers_builds(
    name: str, tmp_path: Path
) -> None:
    kind, changes = KINDS[name]
    config = getattr(transformers, kind)(**SIZES, **changes)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    found = known(str(tmp_path))
    expected = {"embeddings": 0, "attention": 0, "mlp": 0, "norms": 0, "head": 0}
    for path, parameter in model.named_parameters():
        where = (
            "embeddings" if "embed" in path
            else "norms" if "norm" in path
            else "head" if "lm_head" in path
            else "mlp" if "mlp" in path
            else "attention"
        )  # fmt: skip
        expected[where] += parameter.numel()
    assert found.parameters._asdict() == expected
    assert found.parameters.total == sum(p.numel() for p in model.parameters())
    in_layers = [m for path, m in model.named_modules() if "layers.0." in path]
    linear = {m.weight.shape for m in in_layers if isinstance(m, torch.nn.Linear)}
    assert {(one.outputs, one.inputs) for one in found.linear.values()} == linear


@pytest.mark.parametrize(
    ("base", "parameters"),
    [
        ("meta-llama/Meta-Llama-3-8B", 8_030_261_248),
        ("meta-llama/Meta-Llama-3-8B-Instruct", 8_030_261_248),
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
        ("meta-llama/Meta-Llama-3-70B", 70_553_706_496),
        ("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400),
        ("meta-llama/Llama-3.2-3B", 3_212_749_824),
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616),
        ("meta-llama/Llama-2-13b-chat-hf", 13_015_864_320),
        ("meta-llama/Llama-2-70b-hf", 68_976_648_192),
        ("mistralai/Mistral-7B-v0.1", 7_241_732_096),
        ("mistralai/Mistral-7B-Instruct-v0.3", 7_248_023_552),
        ("HuggingFaceH4/zephyr-7b-beta", 7_241_732_096),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", 1_100_048_384),
        ("HuggingFaceTB/SmolLM2-135M", 134_515_008),
        ("HuggingFaceTB/SmolLM2-360M-Instruct", 361_821_120),
        ("HuggingFaceTB/SmolLM2-1.7B", 1_711_376_384),
        ("Qwen/Qwen2.5-0.5B", 494_032_768),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
    ],
)
def test_well_known_names_have_the_parameters_their_model_cards_name(
    base: str, parameters: int
) -> None:
    assert known(base).parameters.total == parameters


def test_the_built_in_base_is_known_before_it_is_built() -> None:
    from medtrain.quickstart.base import VOCAB_SIZE

    found = known("builtin:tiny")
    assert (found.vocab, found.hidden, found.layers) == (VOCAB_SIZE, 128, 3)


def test_the_hub_cache_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--new-model"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    transformers.LlamaConfig(**SIZES).save_pretrained(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    found = known("someone/new-model")
    assert found.hidden == 96
    assert of_base("someone/new-model", revision="0123abcd") == found
    assert of_base("someone/new-model", revision="v2") is None


def test_what_nobody_knows_is_none(tmp_path: Path) -> None:
    assert of_base("someone/something") is None
    for text in ('{"model_type": "mamba", "hidden_size": 8}', '{"model_type": "llama"}', "[]", "{"):
        (tmp_path / "config.json").write_text(text)
        assert of_base(tmp_path) is None
    assert from_config({"model_type": "gpt2"}) is None


def test_control_tokens_of_chatml_are_looked_for(tmp_path: Path) -> None:
    transformers.LlamaConfig(**SIZES).save_pretrained(tmp_path)
    assert not known(str(tmp_path)).knows_chatml
    added = {"added_tokens_decoder": {"1": {"content": "<|im_start|>"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(added))
    assert known(str(tmp_path)).knows_chatml
