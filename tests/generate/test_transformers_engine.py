from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from medtrain.console import Console
from medtrain.data.chat import ChatTokenizer
from medtrain.errors import MedtrainError
from medtrain.generate.engine import Answered, Prompt
from medtrain.generate.forward import Forward
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
    return answered_by(TransformersEngine(source_of(model), chat, sampling), chat, batches)


def answered_by(
    engine: TransformersEngine, chat: ChatTokenizer, batches: list[list[int]]
) -> dict[str, Answered]:
    prompts = [prompt_of(chat, f"r{i}", text, 7 * i, 7 * i + 1) for i, text in enumerate(QUESTIONS)]
    done = list(engine.answer([[prompts[i] for i in batch] for batch in batches]))
    assert len(done) == len({d.id for d in done}), "every prompt is answered once"
    return {d.id: d for d in done}


def test_slots_give_the_same_answers(model: Any, chat: ChatTokenizer) -> None:
    engine = TransformersEngine(source_of(model), chat, SAMPLED, batch_size=2, way="slots")
    expected = answered(model, chat, SAMPLED, [[0, 1, 2, 3, 4]])
    assert answered_by(engine, chat, [[4, 1], [2, 0], [3]]) == expected
    assert answered_by(engine, chat, [[3], [], [0]]) == {i: expected[i] for i in ("r3", "r0")}
    engine.close()


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


@pytest.mark.parametrize("way", ["batches", "slots"])
def test_a_prompt_that_fills_the_context_is_told_and_the_others_go_on(
    model: Any, chat: ChatTokenizer, way: Literal["batches", "slots"]
) -> None:
    full = replace(prompt_of(chat, "full", "x", 1, 2), token_ids=(5,) * 512)
    nearly = replace(full, id="nearly", token_ids=(5,) * 508)
    fine = prompt_of(chat, "fine", "Pain?", 1, 2)
    engine = TransformersEngine(source_of(model), chat, SAMPLED, way=way)
    done = {d.id: d for d in engine.answer([[full, nearly, fine], [replace(full, id="late")]])}
    assert "512 tokens" in done["late"].error
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


class Shortage:
    """A model that runs out of memory whenever more than so many rows go through it."""

    def __init__(self, model: Any, most: int) -> None:
        self._forward, self._most = model.forward, most
        self.__signature__ = inspect.signature(model.forward)
        self.rows: list[int] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.rows.append(len(kwargs["input_ids"]))
        if self.rows[-1] > self._most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self._forward(*args, **kwargs)


class Notes(Console):
    """Remembers what was told."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.events: list[tuple[str, str]] = []

    def event(self, name: str, message: str = "", *, mark: str = "info", **fields: Any) -> None:
        self.events.append((name, message))


@pytest.mark.parametrize("way", ["batches", "slots"])
@pytest.mark.parametrize("most", [1, 2, 3, 7])
def test_too_little_memory_halves_the_rows_and_changes_no_answer(
    model: Any,
    chat: ChatTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    way: Literal["batches", "slots"],
    most: int,
) -> None:
    batches = [[0, 1, 2, 3], [4]]
    expected = answered(model, chat, SAMPLED, batches)
    engine = TransformersEngine(source_of(model), chat, SAMPLED, console=(notes := Notes()),
                                batch_size=4, way=way)  # fmt: skip
    assert answered_by(engine, chat, [[4]]) == answered(model, chat, SAMPLED, [[4]])
    monkeypatch.setattr(model, "forward", shortage := Shortage(model, most))
    assert answered_by(engine_again(engine, model), chat, batches) == expected
    assert max(shortage.rows) > most
    told = [message for name, message in notes.events if name == "too_little_memory"]
    assert told
    assert "rows at a time: going on with" in told[-1]


def engine_again(engine: TransformersEngine, model: Any) -> TransformersEngine:
    """The same engine, whose decoder looks at the model's forward anew."""
    decoder: Any = engine._decoder
    if hasattr(decoder, "_forward"):
        decoder.close()
        decoder._forward = Forward(model)
    return engine


@pytest.mark.parametrize("way", ["batches", "slots"])
def test_too_little_memory_for_one_row_is_an_error_a_user_can_read(
    model: Any,
    chat: ChatTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    way: Literal["batches", "slots"],
) -> None:
    monkeypatch.setattr(model, "forward", Shortage(model, 0))
    engine = TransformersEngine(source_of(model), chat, SAMPLED, way=way)
    with pytest.raises(MedtrainError, match="Too little GPU memory") as caught:
        answered_by(engine, chat, [[0]])
    assert "max_new_tokens" in caught.value.fix


def test_a_model_without_a_limit_has_an_infinite_context(model: Any) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(vocab_size=8, hidden_size=8, n_layer=1, n_head=1)
    assert context_length(model) == 512
    assert context_length(BloomForCausalLM(config)) == float("inf")
