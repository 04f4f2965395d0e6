"""Answers of a GPU are those of a CPU, alone and beside others, by every way of decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from medtrain.console import Console
from medtrain.generate.decode import Question, Row, Vocabulary
from medtrain.generate.decoders import choose_decoder
from medtrain.generate.sampling import Sampling
from medtrain.generate.slots import decoder as slot_decoder
from medtrain.generate.slots.recorded import AsItIs

pytestmark = pytest.mark.gpu
Way = Literal["slots", "batches"]
Answers = list[tuple[int, ...]]
_VOCAB, _STOP, _NEW, _SAMPLES = 512, 3, 24, 2
_CPU = torch.device("cpu")
GREEDY = Sampling(0.0, 0, 1.0, _NEW, _SAMPLES)
DRAWN = Sampling(0.9, 50, 0.9, _NEW, _SAMPLES)


@pytest.mark.parametrize("way", ["slots", "batches"])
def test_greedy_answers_are_those_of_the_cpu(device: torch.device, way: Way) -> None:
    expected = answered(model_on(_CPU), GREEDY, "batches")
    assert answered(model_on(device), GREEDY, way) == expected
    assert len(set(expected)) > len(expected) // 4  # it does say something


@pytest.mark.parametrize("way", ["slots", "batches"])
def test_an_answer_does_not_depend_on_its_neighbours(device: torch.device, way: Way) -> None:
    model = model_on(device)
    alone = [answered(model, GREEDY, way, [prompt])[0] for prompt in prompts()[:6]]
    assert answered(model, GREEDY, way)[: 6 * _SAMPLES : _SAMPLES] == alone


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_graph_answers_as_its_steps_do(
    device: torch.device, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, reasons = model_on(device), []
    real = slot_decoder.recorded

    def noted(stepper: Any) -> Any:
        run = real(stepper)
        reasons.append(run.why_not_recorded)
        return run

    monkeypatch.setattr(slot_decoder, "recorded", noted)
    recorded = answered(model, sampling, "slots")
    monkeypatch.setattr(slot_decoder, "recorded", lambda stepper: AsItIs(stepper, "as asked"))
    assert answered(model, sampling, "slots") == recorded
    if device.type == "cuda":
        assert reasons == [None] * len(reasons), reasons
    assert reasons


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_slots_answer_as_batches_do(device: torch.device, sampling: Sampling) -> None:
    model = model_on(device)
    assert answered(model, sampling, "slots") == answered(model, sampling, "batches")


def test_16_bits_answer_alike(device: torch.device) -> None:
    """Rounding parts a few answers, and none at once."""
    model = model_on(device, torch.bfloat16)
    slots, batches = (answered(model, GREEDY, way) for way in ("slots", "batches"))  # type: ignore[arg-type]
    same = [
        shared(one, other) / max(1, len(one)) for one, other in zip(slots, batches, strict=True)
    ]
    assert sum(same) / len(same) > 0.6
    assert answered(model, GREEDY, "slots") == slots


@pytest.mark.parametrize("way", ["slots", "batches"])
def test_too_little_memory_halves_the_rows_and_goes_on(
    device: torch.device, way: Way, tmp_path: Path
) -> None:
    model, asked = wide_model(device), long_prompts(device)
    sampling = Sampling(0.0, 0, 1.0, 8)
    log = tmp_path / "log"
    with little_memory(model, device):
        found = answered(model, sampling, way, asked, Console(log, quiet=True), frozenset())
    assert "event=too_little_memory" in log.read_text()
    expected = answered(model, sampling, way, asked, stop=frozenset())
    assert [len(answer) for answer in found] == [8] * len(asked)
    same = sum(one == other for one, other in zip(found, expected, strict=True))
    assert same >= 0.9 * len(asked)


# What is asked, of whom


@pytest.fixture(scope="module", autouse=True)
def models_dropped(nothing_left_behind: None) -> Iterator[None]:
    yield
    model_on.cache_clear()
    wide_model.cache_clear()


def answered(
    model: Any,
    sampling: Sampling,
    way: Way,
    asked: list[list[int]] | None = None,
    console: Console | None = None,
    stop: frozenset[int] = frozenset({_STOP}),
) -> Answers:
    """The answers of all prompts, sample by sample."""
    asked = prompts() if asked is None else asked
    vocabulary = Vocabulary(_VOCAB, 0, stop)
    decoder = choose_decoder(
        model, sampling, vocabulary, console or Console(quiet=True), prompts=len(asked), way=way
    )
    seeds = range(sampling.num_samples)
    questions = [
        Question(prompt, [Row(7 * number + s, sampling.max_new_tokens) for s in seeds], number)
        for number, prompt in enumerate(asked)
    ]
    found = sorted(decoder.answer([questions]), key=lambda question: question.tag)
    decoder.close()
    return [tuple(row.tokens) for question in found for row in question.rows]


def prompts() -> list[list[int]]:
    drawn = torch.Generator().manual_seed(1)
    return [torch.randint(4, _VOCAB, (n,), generator=drawn).tolist() for n in range(3, 60, 4)]


def long_prompts(device: torch.device) -> list[list[int]]:
    rows, length = (64, 900) if device.type == "cuda" else (8, 20)
    drawn = torch.Generator().manual_seed(2)
    return [torch.randint(4, _VOCAB, (length,), generator=drawn).tolist() for _ in range(rows)]


@cache
def model_on(device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """Grouped keys, livelier weights than a fresh model's."""
    return _llama(64, 2, 0.15).to(device, dtype)


@cache
def wide_model(device: torch.device) -> Any:
    """On a card 32 KiB a token in float32: 64 prompts of 900 tokens take 2 GB and more."""
    hidden, layers = (1024, 8) if device.type == "cuda" else (64, 2)
    return _llama(hidden, layers, 0.05).to(device)


def _llama(hidden: int, layers: int, spread: float) -> Any:
    config = LlamaConfig(
        vocab_size=_VOCAB, hidden_size=hidden, intermediate_size=2 * hidden,
        num_hidden_layers=layers, num_attention_heads=hidden // 16,
        num_key_value_heads=hidden // 32, max_position_embeddings=1024,
        tie_word_embeddings=False, initializer_range=spread,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return LlamaForCausalLM(config).eval()


def shared(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Tokens until two answers part."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


@contextmanager
def little_memory(model: Any, device: torch.device) -> Iterator[None]:
    """Room for a part of the rows: of the card's memory, or as if it were."""
    limit: Callable[[], Any] = _limited_card if device.type == "cuda" else lambda: _as_if(model, 3)
    with limit():
        yield


@contextmanager
def _limited_card() -> Iterator[None]:
    import gc

    gc.collect()
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 1.2e9) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@contextmanager
def _as_if(model: Any, most: int) -> Iterator[None]:
    def refuse(module: Any, args: Any, kwargs: Any) -> None:
        if len(kwargs["input_ids"]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = model.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
