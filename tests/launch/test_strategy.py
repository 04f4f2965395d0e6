"""Which strategy is taken, and what is refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from medtrain.errors import ConfigError
from medtrain.launch import devices, strategy
from medtrain.launch.strategy import choose
from medtrain.launch.strategy_files import strategy_file
from medtrain.launch.worker import begin
from tests.launch.conftest import config


def test_cpus_shard_nothing_of_their_own_accord() -> None:
    assert choose(config(), "sft", gpus=0).strategy == "ddp"
    assert choose(config(strategy="zero3"), "sft", gpus=0).strategy == "zero3"


@pytest.mark.parametrize(("gib", "expected"), [(80, "ddp"), (48, "zero3")])
def test_auto_takes_the_cheapest_that_fits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gib: int, expected: str
) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8192,'
        '"intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,'
        '"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,'
        '"tie_word_embeddings": false}'
    )
    gpu = devices.Gpu(gib * 2**30, has_bfloat16=True)
    monkeypatch.setattr(devices, "look_at_gpus", lambda: gpu)
    chosen = choose(config({"base": str(tmp_path)}), "sft", gpus=8)
    assert (chosen.strategy, chosen.fits) == (expected, True)
    assert chosen.reason


@pytest.mark.parametrize(
    ("model", "name", "reason"),
    [
        ({}, "fsdp2", "train a model of its own in each process"),
        ({"quantization": "none"}, "fsdp2", "train a model of its own in each process"),
        ({}, "zero3-offload", "they are there already"),
        ({"dtype": "float16"}, "zero2", "no float16 on a CPU"),
    ],
)
def test_what_does_not_work_on_a_cpu_is_refused(
    model: dict[str, object], name: str, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason) as refused:
        choose(config(model, strategy=name), "sft", gpus=0)
    assert "train.strategy=" in refused.value.fix or "model.dtype=" in refused.value.fix
    assert choose(config(model, strategy=name), "sft", gpus=2).strategy == name


def test_without_deepspeed_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategy, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="not installed") as refused:
        choose(config(strategy="zero2"), "sft", gpus=2)
    assert "pip install" in refused.value.fix
    assert choose(config(strategy="fsdp2"), "sft", gpus=2).strategy == "fsdp2"


def test_a_file_of_the_users_names_the_strategy(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(strategy_file("zero2").read_text())
    assert choose(config(accelerate_config=str(own)), "sft", gpus=2).strategy == "zero2"
    with pytest.raises(ConfigError, match=r"train\.strategy is ddp"):
        choose(config(accelerate_config=str(own), strategy="ddp"), "sft", gpus=2)
    json = tmp_path / "ds.json"
    json.write_text('{"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}')
    own.write_text(
        f"distributed_type: DEEPSPEED\ndeepspeed_config:\n  deepspeed_config_file: {json}\n"
    )
    assert choose(config(accelerate_config=str(own)), "sft", gpus=2).strategy == "zero3-offload"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("distributed_type: FSDP\nfsdp_config:\n  fsdp_version: 1\n", "first version"),
        ("distributed_type: MEGATRON_LM\n", "MEGATRON_LM"),
        ("a list\n", "no configuration of accelerate"),
        ("{", "no configuration of accelerate"),
        (None, "there is no file"),
    ],
)
def test_files_that_cannot_be_used_are_refused(
    tmp_path: Path, text: str | None, reason: str
) -> None:
    own = tmp_path / "own.yaml"
    if text is not None:
        own.write_text(text)
    with pytest.raises(ConfigError, match=reason):
        choose(config(accelerate_config=str(own)), "sft", gpus=2)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "fsdp2"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "zero2"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "zero3"),
    ],
)
def test_what_a_person_launched_knows_its_strategy(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str | None
) -> None:
    import os

    monkeypatch.setenv("MEDTRAIN_STRATEGY", "to be restored")
    monkeypatch.delenv("MEDTRAIN_STRATEGY")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    begin()
    assert os.environ.get("MEDTRAIN_STRATEGY") == expected
