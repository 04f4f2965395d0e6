"""Every kernel gives what row by row gives; those of GPUs through references behind their faces."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medtrain.attention import kernels, trial
from medtrain.attention.choice import Choice, Kernel
from medtrain.attention.kernels import Rows, attend_by, row_by_row
from medtrain.attention.trial import Shape, distance_from_rows
from medtrain.errors import ConfigError
from tests.attention import reference

_CPU = torch.device("cpu")


@contextmanager
def varlen(function: Any) -> Iterator[None]:
    with mock.patch("torch.nn.attention.varlen.varlen_attn", function):
        yield


@contextmanager
def flash() -> Iterator[None]:
    with mock.patch.dict(sys.modules, {"flash_attn": reference.flash_attn()}):
        yield


@contextmanager
def efficient() -> Iterator[None]:
    with mock.patch.object(kernels, "_efficient_attention", reference.efficient):
        yield


_WAYS: dict[str, tuple[Kernel, Callable[[], Any]]] = {
    "varlen of 2.10": ("varlen", lambda: varlen(reference.varlen_2_10)),
    "varlen of 2.13": ("varlen", lambda: varlen(reference.varlen_2_13)),
    "flash": ("flash", flash),
    "efficient": ("efficient", efficient),
    "rows": ("rows", lambda: mock.patch.object(kernels, "takes_groups", return_value=False)),
}
_ALL = pytest.mark.parametrize("way", _WAYS)


def shape(dtype: torch.dtype = torch.float32, *, windowed: bool = False) -> Shape:
    return Shape(_CPU, dtype, heads=6, kv_heads=2, head_dim=8, windowed=windowed)


@_ALL
@pytest.mark.parametrize("window", [None, 3, 16, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_those_row_by_row(
    way: str, window: int | None, dtype: torch.dtype
) -> None:
    kernel, there = _WAYS[way]
    with there():
        distance = distance_from_rows(attend_by(kernel), shape(dtype), window)
    assert distance < (1e-5 if dtype == torch.float32 else 1e-2)


@_ALL
@settings(max_examples=15)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6).map(tuple),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    window=st.none() | st.integers(1, 40),
    scale=st.floats(0.05, 2.0),
)
def test_any_rows(
    way: str, lengths: tuple[int, ...], heads: tuple[int, int], window: int | None, scale: float
) -> None:
    kernel, there = _WAYS[way]
    borders = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    rows = Rows(lengths, borders)
    parts = [torch.randn(1, n, sum(lengths), 8) for n in (heads[0], heads[1], heads[1])]
    # As the attention interface hands it over: only where it matters.
    window = window if window and max(lengths) > window else None
    with there():
        found = attend_by(kernel)(*parts, rows, scale, window)
    tokens_first = [part[0].transpose(0, 1) for part in parts]
    left = -1 if window is None else window - 1
    expected = reference.attention(*tokens_first, borders, scale, left)
    assert found.shape == (1, sum(lengths), heads[0], 8)
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-4)


def test_the_efficient_kernel_has_the_interface_that_it_is_called_by() -> None:
    """It is no public one; what it computes is tried on each card."""
    schema = torch.ops.aten._efficient_attention_forward.default._schema
    theirs = [argument.name for argument in schema.arguments]
    ours = list(inspect.signature(reference.efficient).parameters)
    assert theirs[: len(ours)] == ours


def test_a_full_card_says_nothing_about_a_kernel() -> None:
    def full(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with on_a_gpu("varlen"), varlen(full), pytest.raises(torch.OutOfMemoryError):
        trial.settled(shape())
    with on_a_gpu("varlen"), varlen(reference.varlen_2_13):
        assert trial.settled(shape()).kernel == "varlen"


# The trial


def on_a_gpu(*names: Kernel) -> Any:
    """As if these should fit the device, and row by row."""
    choices = [Choice(name, "") for name in (*names, "rows")]
    return mock.patch.object(trial, "choose", return_value=choices)


@pytest.fixture(autouse=True)
def nothing_settled_yet() -> Iterator[None]:
    trial._settled.cache_clear()
    yield
    trial._settled.cache_clear()


def test_a_kernel_that_gives_right_results_is_taken() -> None:
    with on_a_gpu("varlen"), varlen(reference.varlen_2_13):
        choice = trial.settled(shape(windowed=True))
        assert (choice.kernel, choice.surprising) == ("varlen", False)


def test_a_kernel_that_fails_on_the_device_is_not_taken() -> None:
    """As PyTorch's own does on a CPU."""
    with on_a_gpu("varlen"):
        choice = trial.settled(shape())
    assert (choice.kernel, choice.surprising) == ("rows", True)
    assert "no varlen: it fails here (" in choice.reason


def test_a_kernel_whose_results_are_wrong_is_not_taken() -> None:
    """One that takes no notice of the window, for instance."""

    def without_window(*args: Any, window_size: tuple[int, int], **options: Any) -> Any:
        return reference.varlen_2_13(*args, **options, window_size=(-1, 0))

    without_window.__signature__ = inspect.signature(  # type: ignore[attr-defined]
        reference.varlen_2_13
    )
    with on_a_gpu("varlen"), varlen(without_window):
        assert trial.settled(shape()).kernel == "varlen"
        choice = trial.settled(shape(windowed=True))
    assert choice.kernel == "rows"
    assert "no varlen: its results are wrong here" in choice.reason


def test_a_trial_leaves_no_trace() -> None:
    """Neither in dropout's draws nor where gradients are off."""
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        distance_from_rows(row_by_row, shape(), None)
        found = torch.rand(3)
    assert torch.equal(found, expected)


def test_a_kernel_that_was_asked_for_and_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.attention=flash") as caught:
        trial.settled(shape(), "flash_attention_2")
    assert "model.attention=auto" in caught.value.fix
