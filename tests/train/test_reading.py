"""A thread that reads ahead gives what its source gives, and goes when it is told to."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medtrain.train.reading import ReadAhead, pinned


def alive() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "medtrain-reading"]


@given(st.lists(st.integers(), max_size=20), st.integers(1, 4))
def test_the_same_items_in_the_same_order(items: list[int], ahead: int) -> None:
    reader = ReadAhead(iter(items), lambda n: n + 1, ahead=ahead)
    assert list(reader) == [n + 1 for n in items]
    assert list(reader) == [], "it stays at its end"
    assert not alive()


def test_it_stays_no_further_ahead_than_allowed() -> None:
    read: list[int] = []
    third = threading.Event()

    def source() -> Iterator[int]:
        for number in range(100):
            read.append(number)
            if number == 2:
                third.set()
            yield number

    reader = ReadAhead(source(), ahead=2)
    assert next(reader) == 0
    assert third.wait(30)
    assert next(reader) == 1
    reader.close()
    assert len(read) <= 4
    assert not alive()


def test_an_error_is_raised_where_its_item_is_asked_for() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise KeyError("row")

    reader = ReadAhead(source())
    assert next(reader) == 1
    with pytest.raises(KeyError, match="row"):
        next(reader)
    assert not alive()
    with pytest.raises(StopIteration):
        next(reader)


def test_closed_before_anything_was_taken_it_leaves_no_thread() -> None:
    ReadAhead(iter(range(10))).close()
    assert not alive()


def test_every_tensor_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Size] = []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(tensor.shape)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    given_inputs = {"input_ids": torch.ones(2), "packed": {"flat": torch.ones(3), "rows": (1, 2)}}
    found = pinned(given_inputs)
    assert seen == [torch.Size([2]), torch.Size([3])]
    assert found["packed"]["rows"] == (1, 2)
    assert found["input_ids"] is not given_inputs["input_ids"]
