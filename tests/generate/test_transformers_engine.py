from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from medtrain.data.chat import ChatTokenizer
from medtrain.errors import MedtrainError
from medtrain.generate.engine import Answered, Prompt
from medtrain.generate.sampling import Sampling
from medtrain.generate.transformers_engine import TransformersEngine, context_length
from tests.generate.models import QUESTIONS, load_chat, load_model, prompt_of, source_of

SAMPLED = Sampling(1.0, 0, 1.0, max_new_tokens=12, num_samples=2)


@pytest.fixture(scope="module")
def chat(base_dir: Path) -> ChatTokenizer:
    return load_chat(base_dir)


@pytest.fixture(scope="module")
def model(base_dir: Path, chat: ChatTokenizer) -> Any:
    return load_model(base_dir, chat)


def answered(
    model: Any, chat: ChatTokenizer, sampling: Sampling, batches: list[list[int]]
) -> dict[str, Answered]:
    prompts = [prompt_of(chat, f"r{i}", text, 7 * i, 7 * i + 1) for i, text in enumerate(QUESTIONS)]
    engine = TransformersEngine(source_of(model), chat, sampling)
    return {d.id: d for d in engine.answer([[prompts[i] for i in batch] for batch in batches])}


def test_batches_do_not_change_answers(model: Any, chat: ChatTokenizer) -> None:
    together = answered(model, chat, SAMPLED, [[0, 1, 2, 3, 4]])
    assert answered(model, chat, SAMPLED, [[4], [2, 0], [1, 3]]) == together
    assert all(len(done.answers) == 2 for done in together.values())
    assert len({answer.text for done in together.values() for answer in done.answers}) == 10


def test_an_answer_ends_at_the_chat_formats_stop_token(model: Any, chat: ChatTokenizer) -> None:
    def stopping(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits[..., chat.end_token_id] += 100 * (output.logits.shape[0] > 0)
        return output

    forward = model.forward
    stopping.__signature__ = __import__("inspect").signature(forward)  # type: ignore[attr-defined]
    model.forward = stopping
    try:
        done = answered(model, chat, SAMPLED, [[0]])
    finally:
        model.forward = forward
    assert done["r0"].answers == (("", 0, "stop"), ("", 0, "stop"))


def test_a_prompt_that_fills_the_context_is_told_and_the_others_go_on(
    model: Any, chat: ChatTokenizer
) -> None:
    full = replace(prompt_of(chat, "full", "x", 1, 2), token_ids=(5,) * 512)
    nearly = replace(full, id="nearly", token_ids=(5,) * 508)
    fine = prompt_of(chat, "fine", "Pain?", 1, 2)
    engine = TransformersEngine(source_of(model), chat, SAMPLED)
    done = {d.id: d for d in engine.answer([[full, nearly, fine]])}
    assert "512 tokens" in done["full"].error
    assert max(answer.tokens for answer in done["nearly"].answers) <= 4
    assert len(done["fine"].answers) == 2


def test_the_model_is_loaded_when_answers_are_wanted_and_before_a_batch_is_taken(
    chat: ChatTokenizer,
) -> None:
    def load() -> Any:
        raise MedtrainError("loading")

    def batches() -> Iterator[list[Prompt]]:
        raise AssertionError("a death while loading would be blamed on this batch")
        yield []

    answers = TransformersEngine(replace(source_of(None), load=load), chat, SAMPLED).answer(
        batches()
    )
    with pytest.raises(MedtrainError, match="loading"):
        next(answers)


def test_too_little_memory_names_the_setting(
    model: Any, chat: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("medtrain.generate.transformers_engine.decode", full)
    with pytest.raises(MedtrainError, match="Too little GPU memory") as caught:
        answered(model, chat, SAMPLED, [[0]])
    assert "batch_size" in caught.value.fix


def test_a_model_without_a_limit_has_an_infinite_context(model: Any) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(vocab_size=8, hidden_size=8, n_layer=1, n_head=1)
    assert context_length(model) == 512
    assert context_length(BloomForCausalLM(config)) == float("inf")
