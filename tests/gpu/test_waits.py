"""A training step on a GPU makes the host wait for nothing, between two lines of metrics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from medtrain.train.reference import compute_reference
from tests.gpu.conftest import BENCH
from tests.tiny import tiny_base
from tests.train.conftest import Ready, make_ready
from tests.train.training import train

pytestmark = pytest.mark.gpu
_STEPS, _FIRST, _LAST = 12, 4, 11
"""Of all steps, those from the fourth to the last but one."""
_SECTION: dict[str, Any] = {
    "max_steps": _STEPS, "epochs": 4, "batch_size": 2, "gradient_accumulation": 2,
    "validation_fraction": 0, "evals_per_epoch": 0, "log_every": 1000,
}  # fmt: skip


def test_no_call_of_sft_waits(strict: Any, ready: Ready) -> None:
    with strict() as steps:
        assert train(ready, "sft")["steps"] == _STEPS
    assert steps == ["strict", "lenient"]


def test_no_call_of_dpo_waits(strict: Any, ready: Ready) -> None:
    if not ready.run.adapter("sft").is_dir():
        train(ready, "sft")
    compute_reference(*ready)
    with strict() as steps:
        assert train(ready, "dpo")["steps"] == _STEPS
    assert steps == ["strict", "lenient"]


def test_a_wait_would_be_an_error(card: torch.device) -> None:
    """Or the others showed nothing."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            torch.ones(2, device=card).sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> Ready:
    """Rows and pairs; in 16 bits where there is a card."""
    root = tmp_path_factory.mktemp("waits")
    on_card = device.type == "cuda"
    model = {"dtype": "bfloat16" if on_card else "float32"}
    # On a CPU `auto` is not one that the host can run ahead of.
    section = {**_SECTION, "optimizer": "auto" if on_card else "adamw_torch_fused"}
    return make_ready(root / "run", tiny_base(root / "base"), model=model, sft=section, dpo=section)


@pytest.fixture
def strict(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A context in which a call that waits is an error, in the steps that count.

    On a CPU the same code runs ahead and reads ahead, and nobody minds.
    """
    monkeypatch.syspath_prepend(str(BENCH))
    from steps import watched  # type: ignore[import-not-found]

    if device.type == "cpu":
        monkeypatch.setattr("medtrain.train.ahead.DEVICES", ("cpu",))
        monkeypatch.setattr("medtrain.train.step._READ_AHEAD_FOR", ("cpu",))

    @contextmanager
    def context() -> Iterator[list[str]]:
        seen: list[str] = []

        def mode(name: str, said: str) -> None:
            seen.append(said)
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode(name)

        begin, end = lambda: mode("error", "strict"), lambda: mode("default", "lenient")
        try:
            with watched(_FIRST, _LAST, begin, end):
                yield seen
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")

    return context
