"""Slots beside the plain loop: the same tokens, whatever the slots' number and the units' cut."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medtrain.console import Console
from medtrain.errors import MedtrainError
from medtrain.generate.decode import Question, Row, Vocabulary, decode
from medtrain.generate.decoders import choose_decoder
from medtrain.generate.sampling import Sampling, row_seed
from medtrain.generate.slots.cache import CacheShape
from medtrain.generate.slots.decoder import SlotDecoder
from medtrain.generate.slots.fitting import try_slots
from tests.generate.models import load_chat, load_model

VOCABULARY = Vocabulary(size=500, pad=0, stop=frozenset(range(0, 512, 16)))
NOTHING_STOPS = Vocabulary(size=500, pad=0, stop=frozenset())
GREEDY = Sampling(0, 0, 1, max_new_tokens=20)
SAMPLED = Sampling(0.9, 40, 0.95, max_new_tokens=20, num_samples=2)
NUCLEUS = Sampling(1.1, 0, 0.8, max_new_tokens=20, num_samples=3)

Plan = list[list[list[int]]]
"""Units of prompts of token ids."""


def family(name: str) -> Any:
    """A tiny model of a family; windows are shorter than the rows."""
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.15,
        "tie_word_embeddings": False, "pad_token_id": 0,
    }  # fmt: skip
    special: dict[str, Any] = {
        "Llama": {},
        "Mistral": {"sliding_window": 6},
        "Qwen2": {},
        "Qwen3": {"head_dim": 16},
        "Gemma2": {"head_dim": 16, "sliding_window": 6},
        "Gemma3": {"head_dim": 16, "sliding_window": 6,
                   "layer_types": ["sliding_attention", "full_attention"] * 2},
        "Phi3": {},
        "Mixtral": {"num_local_experts": 4},
        # Keys and values of different sizes.
        "DeepseekV3": {"num_key_value_heads": 4, "num_hidden_layers": 2, "n_routed_experts": 4,
                       "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "head_dim": 8,
                       "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
                       "qk_nope_head_dim": 8, "v_head_dim": 12, "moe_intermediate_size": 32},
    }  # fmt: skip
    config = {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        shape = getattr(transformers, config)(**sizes | special[name])
        return getattr(transformers, f"{name}ForCausalLM")(shape).eval()


@pytest.fixture(scope="module")
def model(base_dir: Path) -> Any:
    return load_model(base_dir, load_chat(base_dir))


def plan(seed: int, units: int = 5, longest: int = 30) -> Plan:
    draw = random.Random(seed)
    return [
        [[draw.randrange(500) for _ in range(draw.randint(1, longest))]
         for _ in range(draw.randint(1, 4))]
        for _ in range(units)
    ]  # fmt: skip


def questions(units: Plan, sampling: Sampling) -> list[list[Question]]:
    """A prompt's seeds go with the prompt, wherever it stands."""
    return [
        [
            Question(
                prompt,
                [Row(row_seed(1, str(prompt), i), sampling.max_new_tokens)
                 for i in range(sampling.num_samples)],
            )
            for prompt in unit
        ]
        for unit in units
    ]  # fmt: skip


def answers(asked: Sequence[Sequence[Question]]) -> list[list[tuple[list[int], str | None]]]:
    return [[(row.tokens, row.finish) for row in q.rows] for unit in asked for q in unit]


def plainly(
    model: Any, units: Plan, sampling: Sampling, vocabulary: Vocabulary = VOCABULARY
) -> list[list[tuple[list[int], str | None]]]:
    asked = questions(units, sampling)
    for unit in asked:
        decode(model, [q.prompt for q in unit], [q.rows for q in unit], sampling, vocabulary)
    return answers(asked)


def shape_of(model: Any, sampling: Sampling) -> CacheShape:
    fit = try_slots(model, sampling, VOCABULARY)
    assert fit.shape is not None, fit.why_not
    return fit.shape


def in_slots(
    model: Any,
    units: Plan,
    sampling: Sampling,
    slots: int,
    vocabulary: Vocabulary = VOCABULARY,
) -> list[list[tuple[list[int], str | None]]]:
    asked = questions(units, sampling)
    decoder = SlotDecoder(
        model,
        sampling,
        vocabulary,
        shape=shape_of(model, sampling),
        number=lambda length: slots,
        console=Console(quiet=True),
    )
    done = list(decoder.answer(asked))
    assert len(done) == sum(map(len, units))
    assert {id(q) for q in done} == {id(q) for unit in asked for q in unit}
    return answers(asked)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, NUCLEUS], ids=["greedy", "top-k", "top-p"])
@pytest.mark.parametrize(
    "name",
    ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3", "Phi3", "Mixtral", "DeepseekV3"],
)
def test_slots_draw_the_tokens_of_the_plain_loop(name: str, sampling: Sampling) -> None:
    model, units = family(name), plan(5, units=4)
    expected = plainly(model, units, sampling)
    assert in_slots(model, units, sampling, slots=5) == expected
    assert len({len(tokens) for rows in expected for tokens, _ in rows}) > 2, "no refill otherwise"


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 12), st.integers(0, 10**6), st.integers(1, 6))
def test_neither_the_slots_number_nor_the_cut_into_units_changes_an_answer(
    model: Any, slots: int, seed: int, cut: int
) -> None:
    prompts = [prompt for unit in plan(seed, units=3) for prompt in unit]
    units = [prompts[i : i + cut] for i in range(0, len(prompts), cut)]
    expected = plainly(model, [prompts], SAMPLED)
    assert in_slots(model, units, SAMPLED, slots) == expected


def test_units_of_very_different_lengths_get_slots_of_their_own(model: Any) -> None:
    units = [plan(1, 1, longest=300)[0], plan(2, 1, longest=20)[0], plan(3, 1, longest=200)[0]]
    assert in_slots(model, units, SAMPLED, slots=4) == plainly(model, units, SAMPLED)


def test_a_prompt_that_leaves_one_position_gets_one_token(model: Any) -> None:
    asked = [[Question([5] * 511, [Row(1, 1), Row(2, 1)])], [Question([7, 8], [Row(3, 20)])]]
    decoder = SlotDecoder(
        model, SAMPLED, NOTHING_STOPS, shape=shape_of(model, SAMPLED), number=lambda length: 3,
        console=Console(quiet=True),
    )  # fmt: skip
    assert len(list(decoder.answer(asked))) == 2
    assert [[len(row.tokens) for row in q.rows] for unit in asked for q in unit] == [[1, 1], [20]]


def test_every_row_has_its_own_limit_and_the_longest_is_kept_whole(model: Any) -> None:
    asked = [[Question([4, 5, 6], [Row(1, 3), Row(1, 20), Row(1, 1)])]]
    decoder = SlotDecoder(
        model, SAMPLED, NOTHING_STOPS, shape=shape_of(model, SAMPLED), number=lambda length: 2,
        console=Console(quiet=True),
    )  # fmt: skip
    [question] = decoder.answer(asked)
    short, long, one = (row.tokens for row in question.rows)
    assert [len(short), len(long), len(one)] == [3, 20, 1]
    assert long[:3] == short
    assert long[:1] == one


def test_few_units_are_in_flight(model: Any) -> None:
    """What is taken is blamed where its process dies."""
    units, taken, most = plan(9, units=12), 0, 0

    def taking() -> Iterator[list[Question]]:
        nonlocal taken
        for unit in questions(units, SAMPLED):
            taken += len(unit)
            yield unit

    decoder = SlotDecoder(
        model, SAMPLED, VOCABULARY, shape=shape_of(model, SAMPLED), number=lambda length: 8,
        console=Console(quiet=True),
    )  # fmt: skip
    for done, _ in enumerate(decoder.answer(taking())):
        most = max(most, taken - done)
    assert most <= 8 + 4, "as many as have slots, and what is left of a unit"


def test_a_decoder_goes_on_after_somebody_stopped_listening(model: Any) -> None:
    decoder = SlotDecoder(
        model, SAMPLED, VOCABULARY, shape=shape_of(model, SAMPLED), number=lambda length: 4,
        console=Console(quiet=True),
    )  # fmt: skip
    units = plan(4)
    abandoned: Any = decoder.answer(questions(units, SAMPLED))
    next(abandoned)
    abandoned.close()
    asked = questions(units, SAMPLED)
    assert len(list(decoder.answer(asked))) == sum(map(len, units))
    assert answers(asked) == plainly(model, units, SAMPLED)


def test_a_models_own_attention_comes_back(model: Any) -> None:
    before = model.config._attn_implementation
    in_slots(model, plan(1, 1), GREEDY, 2)
    assert model.config._attn_implementation == before


def test_a_model_that_outputs_no_numbers_is_an_error_a_user_can_read(base_dir: Path) -> None:
    broken = load_model(base_dir, load_chat(base_dir))
    shape = shape_of(broken, SAMPLED)
    broken.model.norm.weight.data[0] = float("nan")
    decoder = SlotDecoder(
        broken, SAMPLED, VOCABULARY, shape=shape, number=lambda length: 4,
        console=Console(quiet=True),
    )  # fmt: skip
    with pytest.raises(MedtrainError, match="not a number"):
        list(decoder.answer(questions(plan(1), SAMPLED)))


class Said(Console):
    """Remembers what was told."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []
        self.warnings: list[str] = []

    def event(self, name: str, message: str = "", *, mark: str = "info", **fields: Any) -> None:
        (self.warnings if mark == "warn" else self.lines).append(message)

    def log_only(self, name: str, **fields: Any) -> None:
        self.lines.append(fields["message"])


def test_a_cpu_decodes_batch_by_batch_and_says_why(model: Any) -> None:
    decoder = choose_decoder(model, SAMPLED, VOCABULARY, said := Said())
    assert not isinstance(decoder, SlotDecoder)
    assert said.lines == ["decoding: batch by batch, because there is no CUDA device"]


def test_slots_are_told_once_with_their_size(model: Any) -> None:
    decoder = choose_decoder(model, SAMPLED, VOCABULARY, said := Said(), prompts=3, way="slots")
    for _ in range(2):
        list(decoder.answer(questions(plan(1), SAMPLED)))
    assert said.lines == ["decoding: slots step by step, 6 rows x 128 positions"]
    assert not said.warnings


def unfitting(kind: str) -> Any:
    from transformers import (
        BloomConfig,
        BloomForCausalLM,
        GptOssConfig,
        GptOssForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        MambaConfig,
        MambaForCausalLM,
    )

    sizes: dict[str, Any] = {"vocab_size": 512, "hidden_size": 32, "num_attention_heads": 2,
                             "num_key_value_heads": 1, "intermediate_size": 32,
                             "num_hidden_layers": 2}  # fmt: skip
    if kind == "bloom":
        return BloomForCausalLM(BloomConfig(vocab_size=512, hidden_size=32, n_layer=2, n_head=2))
    if kind == "mamba":
        return MambaForCausalLM(MambaConfig(vocab_size=512, hidden_size=32, num_hidden_layers=2))
    if kind == "sinks":
        return GptOssForCausalLM(GptOssConfig(**sizes, head_dim=16, num_local_experts=4))
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    return LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=rope))


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("bloom", "attention of its own"),
        ("mamba", "mamba has"),
        ("sinks", "its attention has s_aux"),
        ("dynamic", "the longest row"),
    ],
)
def test_a_model_that_slots_are_not_for_is_told_apart(kind: str, why: str) -> None:
    decoder = choose_decoder(
        unfitting(kind).eval(), GREEDY, VOCABULARY, said := Said(), way="slots"
    )
    assert not isinstance(decoder, SlotDecoder)
    [line] = said.warnings if kind == "sinks" else said.lines
    assert line.startswith("decoding: batch by batch, because")
    assert why in line


def test_a_model_whose_slots_disagree_is_decoded_batch_by_batch(model: Any) -> None:
    attention = model.model.layers[0].self_attn
    forward = attention.forward

    def looks_at_the_mask(*args: Any, **kwargs: Any) -> Any:
        hidden, weights = forward(*args, **kwargs)
        return hidden * (1.0 if kwargs.get("attention_mask") is None else 2.0), weights

    attention.forward = looks_at_the_mask
    try:
        fit = try_slots(model, GREEDY, VOCABULARY)
    finally:
        attention.forward = forward
    assert fit.shape is None
    assert fit.surprising
    assert "standard deviations off" in fit.why_not
