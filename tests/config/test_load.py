"""One file, its parents, overrides: a RunConfig or every problem at once."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from medtrain.config import dump_config, load_config, parse_config
from medtrain.config.schema import json_schema
from medtrain.config.trainer_fields import trainer_fields
from medtrain.errors import ConfigError

SHIPPED = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def tree(**changes: Any) -> dict[str, Any]:
    return {
        "name": "t",
        "model": {"base": "somewhere"},
        "data": {"sources": [{"adapter": "table", "path": "rows.jsonl"}]},
        **changes,
    }


def problems_of(given_tree: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(given_tree)
    assert caught.value.exit_code == 64
    return caught.value.message


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_configs_load_and_open_with_their_command(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    lines = path.read_text().splitlines()
    assert lines[0].startswith(f"# medtrain run configs/{path.name}")
    assert any(line.startswith("# Needs:") for line in lines)


def test_user_material_is_in_the_shipped_configs() -> None:
    folder = SHIPPED[0].parent
    llama3 = load_config(folder / "llama3-8b-medqa.yaml")
    assert (llama3.data.max_rows, llama3.data.seed, llama3.data.eval_fraction) == (5000, 50, 0.1)
    assert llama3.sft.lora.targets == ["q_proj", "v_proj"]
    assert (llama3.dpo.beta, llama3.dpo.learning_rate, llama3.dpo.warmup_ratio) == (0.1, 5e-5, 0.03)
    assert (llama3.dpo.batch_size, llama3.dpo.gradient_accumulation) == (2, 2)
    llama2 = load_config(folder / "llama2-13b-pubmedqa.yaml")
    assert (llama2.sft.lora.r, llama2.sft.lora.alpha, llama2.sft.lora.dropout) == (4, 32, 0.1)
    assert (llama2.sft.max_length, llama2.judge.rating_scale) == (512, 5)
    mistral = load_config(folder / "mistral-7b-pubmedqa.yaml")
    assert (mistral.sft.epochs, mistral.sft.learning_rate, mistral.sft.max_length) == (
        4,
        1e-4,
        2048,
    )
    tiny = load_config(folder / "tinyllama-medquad.yaml")
    assert (tiny.sft.batch_size, tiny.sft.gradient_accumulation, tiny.sft.epochs) == (4, 8, 3)


def test_every_problem_is_named_once_with_the_nearest_name() -> None:
    message = problems_of(
        tree(
            model={"base": "x", "quantisation": "nf4", "dtype": "bf16"},
            sft={"batch_size": "four", "lora": {"rank": 8}, "trainer": {"neftune_noise_alph": 5}},
            dpo={"beta": 0},
        )
    )
    assert message.startswith("6 problems")
    assert "model.quantisation: unknown key. Did you mean 'quantization'?" in message
    assert "model.dtype: 'bf16' is not valid" in message
    assert "'bfloat16'" in message
    assert "sft.batch_size" in message
    assert "sft.lora.rank: unknown key" in message
    assert "sft.trainer.neftune_noise_alph" in message
    assert "Did you mean 'neftune_noise_alpha'?" in message
    assert "dpo.beta: input should be greater than 0, not 0" in message


def test_unknown_adapter_lists_the_adapters() -> None:
    message = problems_of(tree(data={"sources": [{"adapter": "tabel", "path": "x"}]}))
    assert "data.sources.0.adapter: 'tabel' is not valid" in message
    assert "Did you mean 'table'?" in message


def test_unknown_key_of_a_source_lists_that_sources_keys() -> None:
    message = problems_of(tree(data={"sources": [{"adapter": "pubmedqa", "pth": "x"}]}))
    assert "data.sources.0.pth: unknown key. Did you mean 'path'?" in message
    assert "decision_template" in message


def test_trainer_fields_that_medtrain_sets_are_refused() -> None:
    message = problems_of(tree(sft={"trainer": {"output_dir": "x", "learning_rate": 1.0}}))
    assert "sft.trainer.output_dir: set by medtrain itself" in message
    assert "set `sft.learning_rate` instead" in message


def test_trainer_fields_are_those_of_trl() -> None:
    from dataclasses import fields

    from trl import DPOConfig, SFTConfig

    assert {f.name for f in fields(SFTConfig)} <= set(trainer_fields("sft"))
    assert {f.name for f in fields(DPOConfig)} <= set(trainer_fields("dpo"))


def test_trainer_fields_of_the_wrong_type_are_refused() -> None:
    extra = {"adam_epsilon": "small", "loss_type": "dft", "run_name": "mine", "tf32": True,
             "adam_beta1": 1, "bf16": True, "warmup_ratio": 0.1}  # fmt: skip
    message = problems_of(tree(sft={"trainer": extra}))
    assert message.startswith("3 problems")
    assert "sft.trainer.adam_epsilon: 'small' is not of type float" in message
    assert "sft.trainer.bf16: set by medtrain itself; set `model.dtype`" in message
    assert "set `sft.warmup_ratio` instead" in message


def test_rules_between_sections_are_in_the_same_message() -> None:
    message = problems_of(
        tree(
            model={"base": "b", "attention": "eager"},
            sft={"packing": True},
            dpo={"early_stopping": 2, "validation_fraction": 0},
            generate={"engine": "openai"},
            evaluate={"engine": "openai"},
            judge={"kind": "rule"},
        )
    )
    assert message.startswith("5 problems")
    for part in ("sft.packing needs another", "dpo: early_stopping needs",
                 "generate.engine=openai needs", "evaluate.engine=openai needs",
                 "Did you mean 'rules'"):  # fmt: skip
        assert part in message
    # A section with a mistake of its own is not judged by what its defaults would be.
    wrong = tree(model={"attention": "eager"}, sft={"packing": True})
    assert problems_of(wrong).startswith("1 problem")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (0, "train.processes: input should be greater than or equal to 1, not 0"),
        (1.5, "train.processes: 1.5 is not valid; valid: 'auto', or a whole number."),
        ("many", "train.processes: 'many' is not valid; valid: 'auto', or a whole number."),
    ],
)
def test_a_number_that_may_be_a_word_is_one_problem(given: object, said: str) -> None:
    message = problems_of(tree(train={"processes": given}))
    assert message.startswith("1 problem")
    assert said in message


def test_a_key_in_the_wrong_section_is_told_its_own() -> None:
    message = problems_of(tree(train={"packing": True}))
    assert "train.packing: unknown key. There is sft.packing and dpo.packing." in message


def test_names_of_two_lists_are_one_problem() -> None:
    message = problems_of(tree(train={"strategy": "zero4"}))
    assert message.startswith("1 problem")
    assert "'zero3-offload' or 'fsdp2', or 'auto'. Did you mean 'zero3'?" in message


def test_a_value_that_may_be_two_things_is_one_problem() -> None:
    message = problems_of(
        tree(
            sft={"lora": {"targets": "q_proj"}, "activation_checkpointing": "maybe"},
            evaluate={"variants": ["bas", {"name": "a"}]},
        )
    )
    assert message.startswith("4 problems")
    assert "sft.lora.targets: 'q_proj' is not valid; valid: 'all-linear', or a list." in message
    assert "valid: 'auto', or true or false" in message
    assert "evaluate.variants.0: 'bas' is not valid" in message
    assert "evaluate.variants.1.path: this key is required" in message


def test_numbers_in_scientific_notation_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        yaml.safe_dump(tree()) + "sft: {learning_rate: 1e-4, trainer: {adam_epsilon: 1e-9}}\n"
    )
    config = load_config(path, ["sft.trainer.adam_beta2=9.9e-1", "model.revision='1e5'"])
    assert config.sft.learning_rate == 1e-4
    assert config.sft.trainer == {"adam_epsilon": 1e-9, "adam_beta2": 0.99}
    path.write_text(dump_config(config))
    assert load_config(path) == config
    assert "finite number" in problems_of(tree(sft={"learning_rate": float("inf")}))


def test_extends_and_overrides(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(tree(name="base", sft={"epochs": 3})))
    child = tmp_path / "child.yaml"
    child.write_text("extends: base.yaml\nsft: {learning_rate: 0.001}\n")
    config = load_config(child, ["sft.lora.targets=[q_proj]", "data.sources.0.path=other.csv"])
    assert config.name == "child"
    assert (config.sft.epochs, config.sft.learning_rate) == (3, 0.001)
    assert config.sft.lora.targets == ["q_proj"]
    assert config.data.sources[0].path == "other.csv"


def test_extends_in_a_circle_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml")
    (tmp_path / "b.yaml").write_text("extends: a.yaml")
    with pytest.raises(ConfigError, match="circle"):
        load_config(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    "override", ["sft.epochs", "=3", "data.sources.7.path=x", "name.x=1", "sft..x=1"]
)
def test_bad_overrides(override: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(tree()))
    with pytest.raises(ConfigError):
        load_config(path, [override])


@pytest.mark.parametrize("text", ["- 1", "a: [", "\x00", "plain"])
def test_files_that_are_no_mapping(text: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        load_config(path)


def test_packing_needs_attention_that_keeps_rows_apart() -> None:
    wrong = tree(model={"base": "b", "attention": "eager"}, dpo={"packing": True})
    assert "dpo.packing needs another model.attention than eager" in problems_of(wrong)
    parse_config(tree(model={"base": "b", "attention": "eager"}))  # auto does without


def test_smoothing_that_trl_would_ignore_is_refused() -> None:
    assert "loss_type: robust" in problems_of(tree(dpo={"label_smoothing": 0.1}))
    parse_config(tree(dpo={"label_smoothing": 0.1, "loss_type": "robust"}))


def test_schema_has_a_description_for_every_key() -> None:
    schema = json_schema()
    json.dumps(schema)
    assert "name" not in schema["required"]
    undescribed = [
        f"{name}.{key}"
        for name, section in schema["$defs"].items()
        for key, value in section.get("properties", {}).items()
        if "description" not in value and key != "adapter"
    ]
    assert not undescribed


@given(
    epochs=st.floats(0.1, 100),
    targets=st.one_of(st.just("all-linear"), st.lists(st.text(min_size=1), min_size=1)),
    prompt=st.one_of(st.none(), st.text()),
    trainer=st.dictionaries(st.just("neftune_noise_alpha"), st.floats(0, 10)),
)
def test_dumped_configuration_loads_to_the_same(
    epochs: float, targets: Any, prompt: str | None, trainer: dict[str, float]
) -> None:
    config = parse_config(
        tree(
            model={"base": "x", "system_prompt": prompt},
            sft={"epochs": epochs, "lora": {"targets": targets}, "trainer": trainer},
        )
    )
    assert parse_config(yaml.safe_load(dump_config(config))) == config


@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["model", "data", "sources", "sft", "lora", "adapter", "base", "zzz"]
                ),
                inner,
                max_size=3,
            )
        ),
    )
)
def test_any_tree_is_a_config_or_a_config_error(value: Any) -> None:
    with suppress(ConfigError):
        parse_config(value if isinstance(value, dict) else {"name": value})
