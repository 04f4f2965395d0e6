"""The part `decoding` of bench/gpu.py: medtrain's decoders beside `model.generate`.

A model of random 16-bit weights → prompts of 40 to 159 tokens, two answers each, nobody stops early
→ tokens a second by the decoder that medtrain chooses, by the same without a CUDA graph, batch by
batch, and by `model.generate`. The floor of a step is reading every weight once.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal
from unittest import mock

from generate import with_generate
from random_llama import LLAMA_3_1B, LLAMA_3_8B, TINY, random_llama
from record import Record, settle

from medtrain.console import Console

Way = Literal["slots", "eager slots", "batches"]
SAMPLES, NEW = 2, 96
_SHORT = 4
"""New tokens of a first go, which warms up."""


def decoding(record: Record) -> None:
    """An 8B and a 1B, 8 prompts at a time and 32."""
    for name, shape in (("8b", LLAMA_3_8B), ("1b", LLAMA_3_1B))[: 1 if record.tiny else 2]:
        make = partial(_model, TINY if record.tiny else shape)
        model = record.attempt(f"{name} model", make, seconds=12)
        if model is None:
            continue
        for together in (8, 32):
            sides = Sides(model, 2 if record.tiny else together)
            _one_size(record, f"{name} {together} × {SAMPLES}", sides, 8 if record.tiny else NEW)
            sides.close()
        del model, sides


def _one_size(record: Record, title: str, sides: Sides, new: int) -> None:
    baseline: list[float] = []
    ways: dict[str, Callable[[int], None]] = {
        "model.generate": sides.by_generate,
        "medtrain": partial(sides.by_medtrain, "slots"),
        "medtrain without a graph": partial(sides.by_medtrain, "eager slots"),
        "medtrain batch by batch": partial(sides.by_medtrain, "batches"),
    }
    for said, work in ways.items():

        def one(said: str = said, work: Callable[[int], None] = work) -> None:
            work(_SHORT)
            seconds = min(_seconds(partial(work, new)) for _ in range(2))
            baseline.append(seconds)
            rate, step_ms = sides.rows * new / seconds, seconds / new * 1e3
            ratio = baseline[0] / seconds
            record.figure(
                f"{title} {said}",
                f"{rate:,.0f} tokens/s, {step_ms:.2f} ms a step, {ratio:.2f} times model.generate",
                tokens_per_s=rate, step_ms=step_ms, ratio=ratio,
            )  # fmt: skip

        record.attempt(f"{title} {said}", one, seconds=8)
        if not baseline:
            return  # nothing to compare with


class Sides:
    """The same prompts, by every way to answer them."""

    def __init__(self, model: Any, together: int) -> None:
        self._model, self._prompts = model, _prompts(together, model.config.vocab_size)
        self._decoders: dict[Way, Any] = {}
        self.rows = together * SAMPLES
        """Answers at a time."""

    def by_generate(self, new: int) -> None:
        """transformers alone."""
        _cudnn(True)
        arguments: Any = SimpleNamespace(samples=SAMPLES, tokens=new)
        with_generate(self._model, [self._prompts], arguments)

    def by_medtrain(self, way: Way, new: int) -> None:
        """A decoder of ours, which is kept as an engine keeps it."""
        from medtrain.generate.decode import Question, Row

        _cudnn(False)
        if way not in self._decoders:
            self.close()
            self._decoders[way] = self._decoder("batches" if way == "batches" else "slots")
        questions = [
            Question(prompt, [Row(seed, new) for seed in range(SAMPLES)])
            for prompt in self._prompts
        ]
        with eager_steps() if way == "eager slots" else nullcontext():
            for _ in self._decoders[way].answer([questions]):
                pass

    def close(self) -> None:
        """Let go of what decoders hold."""
        import torch

        for decoder in self._decoders.values():
            decoder.close()
        self._decoders.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _decoder(self, way: Literal["slots", "batches"]) -> Any:
        from medtrain.generate.decode import Vocabulary
        from medtrain.generate.decoders import choose_decoder
        from medtrain.generate.sampling import Sampling

        return choose_decoder(
            self._model, Sampling(0.7, 50, 0.9, NEW, SAMPLES),
            Vocabulary(self._model.config.vocab_size, 0, frozenset()), Console(quiet=True),
            prompts=len(self._prompts), way=way,
        )  # fmt: skip


@contextmanager
def eager_steps() -> Iterator[None]:
    """Have slots run every step launch by launch."""
    from medtrain.generate.slots import decoder
    from medtrain.generate.slots.recorded import AsItIs

    with mock.patch.object(decoder, "recorded", lambda stepper: AsItIs(stepper, "as asked")):
        yield


def _cudnn(on: bool) -> None:
    """Each side as it comes: medtrain leaves cuDNN's attention out where it loads a model."""
    import torch

    torch.backends.cuda.enable_cudnn_sdp(on)


def _model(shape: dict[str, Any]) -> Any:
    import torch
    from transformers import LlamaConfig

    on_gpu = torch.cuda.is_available()
    return random_llama(
        LlamaConfig(**shape),
        dtype=torch.bfloat16 if on_gpu else torch.float32,
        device=torch.device("cuda", 0) if on_gpu else torch.device("cpu"),
        attention="sdpa",
        quantized=False,
    )


def _prompts(count: int, vocabulary: int) -> list[list[int]]:
    import torch

    drawn = torch.Generator().manual_seed(0)
    lengths = sorted(40 + (i * 37) % 120 for i in range(count))
    return [torch.randint(2, vocabulary, (n,), generator=drawn).tolist() for n in lengths]


def _seconds(work: Callable[[], None]) -> float:
    settle()
    began = time.perf_counter()
    work()
    settle()
    return time.perf_counter() - began
