"""A step of all slots: what makes it fit to be recorded, and what happens where it cannot be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from medtrain.generate import draw
from medtrain.generate.decode import Vocabulary
from medtrain.generate.forward import Forward
from medtrain.generate.sampling import Sampling, uniforms
from medtrain.generate.slots import recorded as recording
from medtrain.generate.slots.cache import CacheShape, SlotCache
from medtrain.generate.slots.fitting import try_slots
from medtrain.generate.slots.prompts import read
from medtrain.generate.slots.stepper import Entry, Stepper
from tests.generate.models import load_chat, load_model

VOCABULARY = Vocabulary(size=500, pad=0, stop=frozenset({3, 99}))
GREEDY = Sampling(0, 0, 1, max_new_tokens=12)
TOP_K = Sampling(0.8, 50, 0.9, max_new_tokens=12)
TOP_P = Sampling(0.8, 0, 0.9, max_new_tokens=12)
ALL = Sampling(0.8, 0, 1, max_new_tokens=12)
LENGTH = 128


@pytest.fixture(scope="module")
def model(base_dir: Path) -> Any:
    return load_model(base_dir, load_chat(base_dir))


@pytest.fixture(scope="module")
def shape(model: Any) -> CacheShape:
    fit = try_slots(model, GREEDY, VOCABULARY)
    assert fit.shape is not None
    return fit.shape


def stepper_of(model: Any, shape: CacheShape, slots: int, sampling: Sampling = TOP_K) -> Stepper:
    cache = SlotCache(shape, slots, LENGTH)
    return Stepper(Forward(model), cache, sampling, VOCABULARY.size, VOCABULARY.stop)


PROMPTS = [[5, 6, 7, 8], [9] * 11, [20, 21]]


def entry(number: int) -> Entry:
    prompt = PROMPTS[number]
    return Entry(number, prompt[-1], len(prompt), 12, uniforms(number, 12))


_WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "item")
_COPIES = ("lift_fresh", "_pin_memory")


class HostLooks(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU, or hands a GPU something new from the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        assert name not in (*_WAITS, *_COPIES), f"a step calls {name}"
        if name in ("index", "index_put"):
            indices = [index for index in args[1] if index is not None]
            assert all(index.dtype == torch.int64 for index in indices), "nonzero in disguise"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampling", [GREEDY, TOP_K, TOP_P, ALL], ids=str)
@torch.no_grad()
def test_a_step_never_makes_the_host_look(
    model: Any, shape: CacheShape, monkeypatch: pytest.MonkeyPatch, sampling: Sampling
) -> None:
    # On a CPU the draw looks, where that costs nothing; here it is to do as on a GPU.
    monkeypatch.setattr(draw, "most_likely", draw.largest_keys)
    stepper = stepper_of(model, shape, 3, sampling)
    stepper.enter(read(Forward(model), PROMPTS, 0), [entry(0), entry(2)], [2, 0])
    stepper.step()
    with HostLooks():
        stepper.step()
    stepper.step()
    assert stepper.status.tolist()[1] == 0, "a slot without a row comes along and stays idle"


@torch.no_grad()
def test_what_a_step_keeps_stays_where_it_is(model: Any, shape: CacheShape) -> None:
    def addresses() -> list[int]:
        kept = [t for t in vars(stepper).values() if isinstance(t, torch.Tensor)]
        buffers = [t for layer in stepper.cache.layers for t in (layer.keys, layer.values)]
        return [t.data_ptr() for t in [*kept, *buffers, stepper.cache.positions]]

    stepper = stepper_of(model, shape, 3)
    before = addresses()
    for slot in (0, 2):
        stepper.enter(read(Forward(model), PROMPTS, 0), [entry(1)], [slot])
        for _ in range(3):
            stepper.step()
    stepper.look([0, 2])
    del stepper.logits
    assert addresses() == before


@pytest.mark.parametrize("slot", range(4))
@torch.no_grad()
def test_a_row_computes_the_same_bits_in_any_slot_beside_anybody(
    model: Any, shape: CacheShape, slot: int
) -> None:
    def logits(mine: int, others: dict[int, int]) -> list[torch.Tensor]:
        stepper, seen = stepper_of(model, shape, 4), []
        prompts = read(Forward(model), PROMPTS, 0)
        slots = {mine: 1, **others}
        stepper.enter(prompts, [entry(number) for number in slots.values()], list(slots))
        for _ in range(4):
            stepper.step()
            seen.append(stepper.logits[mine].clone())
        return seen

    alone = logits(0, {})
    among = logits(slot, {i: (0, 2)[i % 2] for i in range(4) if i != slot})
    assert all(torch.equal(a, b) for a, b in zip(alone, among, strict=True))


class FakeGraphs:
    """CUDA graphs on a machine without CUDA: a replay does the step again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stepper: Stepper) -> None:
        self.stepper, self.replays, self.steps = stepper, 0, 0
        self.stream = self.before = object()
        self.failure: Exception | None = None
        self.off_by = 0.0
        self.modes: list[Any] = []
        self.waits = False
        step = stepper.step

        def counted() -> None:
            self.steps += 1
            if self.waits and self.modes[-1:] == ["error"]:
                raise RuntimeError("called a synchronizing CUDA operation")
            step()

        monkeypatch.setattr(stepper, "step", counted)
        monkeypatch.setattr(recording, "is_on_gpu", lambda stepper: True)
        fakes: dict[str, Callable[..., Any]] = {
            "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
            "stream": self._on,
            "device": self._on,
            "current_stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
            "set_stream": lambda stream: None,
            "get_sync_debug_mode": lambda: 0,
            "set_sync_debug_mode": self.modes.append,
            "CUDAGraph": lambda: SimpleNamespace(replay=self._replay),
            "graph": self._graph,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    @contextmanager
    def _on(self, *_: Any) -> Iterator[None]:
        yield

    @contextmanager
    def _graph(self, graph: Any, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        yield
        if self.failure is not None:
            try:
                raise self.failure
            finally:
                raise RuntimeError("operation failed due to a previous error during capture")

    def _replay(self) -> None:
        self.replays += 1
        self.stepper.logits.add_(self.off_by)


@torch.no_grad()
def test_a_step_is_warmed_up_recorded_compared_and_then_replayed(
    model: Any, shape: CacheShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeGraphs(monkeypatch, stepper := stepper_of(model, shape, 3))
    run = recording.recorded(stepper)
    assert run.why_not_recorded is None
    assert (fake.steps, fake.replays) == (4, 1)
    run()
    assert (fake.steps, fake.replays) == (4, 2)
    assert stepper.status.tolist() == [0, 0, 0]


@torch.no_grad()
def test_a_step_that_cannot_be_recorded_runs_as_it_is(
    model: Any, shape: CacheShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeGraphs(monkeypatch, stepper := stepper_of(model, shape, 3))
    fake.failure = RuntimeError("operation not permitted when stream is capturing")
    run = recording.recorded(stepper)
    assert "previous error" in (run.why_not_recorded or "")
    run()
    assert (fake.steps, fake.replays) == (5, 0)


@torch.no_grad()
def test_a_step_that_waits_for_the_device_is_not_even_tried(
    model: Any, shape: CacheShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recording that breaks off would leave PyTorch in the middle of it."""
    fake = FakeGraphs(monkeypatch, stepper := stepper_of(model, shape, 3))
    fake.waits, fake.failure = True, AssertionError("recorded all the same")
    run = recording.recorded(stepper)
    assert "synchronizing CUDA operation" in (run.why_not_recorded or "")
    assert fake.modes == ["error", 0]
    run()
    assert (fake.steps, fake.replays) == (4, 0)


@torch.no_grad()
def test_a_replay_that_gives_something_else_is_not_used(
    model: Any, shape: CacheShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeGraphs(monkeypatch, stepper := stepper_of(model, shape, 3))
    fake.off_by = 1000.0
    assert "standard deviations off" in (recording.recorded(stepper).why_not_recorded or "")


@torch.no_grad()
def test_too_little_memory_while_recording_is_too_little_memory(
    model: Any, shape: CacheShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeGraphs(monkeypatch, stepper := stepper_of(model, shape, 3))
    fake.failure = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        recording.recorded(stepper)
