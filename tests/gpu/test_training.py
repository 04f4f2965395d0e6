"""A GPU learns what a CPU learns, and a training that was stopped what one learns that was not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.gpu.commands import Done, Stopped

pytestmark = pytest.mark.gpu
_STOPPED = 75


@pytest.mark.parametrize(("dtype", "share"), [("float32", 1e-4), ("bfloat16", 1e-2)])
def test_losses_are_those_of_the_cpu(loss_runs: Any, dtype: str, share: float) -> None:
    exact, found = (loss_runs[name].result() for name in ("cpu", dtype))
    assert exact.code == 0, exact.said
    assert found.code == 0, found.said
    assert len(found.losses()) == len(exact.losses())
    assert found.losses() == pytest.approx(exact.losses(), rel=share)


def test_a_training_that_was_stopped_ends_as_if_it_had_not(stopped_runs: Any) -> None:
    """Byte for byte where two undisturbed ones are; else no further away than they are."""
    calm, stopped, resumed = _ended(stopped_runs.result())
    assert stopped.code == _STOPPED, stopped.said
    assert resumed.code == 0, resumed.said
    assert "event=resume" in resumed.run.log.read_text()
    one, other, gone_on = (_adapter(done) for done in (*calm, resumed))
    assert _apart(one, gone_on) <= 2 * _apart(one, other)
    assert one.keys() == other.keys() == gone_on.keys()


def test_training_runs_with_expandable_segments(expandable_run: Any) -> None:
    done: Done = expandable_run.result()
    assert done.code == 0, done.said


def _ended(runs: Stopped) -> Stopped:
    for done in runs.calm:
        assert done.code == 0, done.said
    return runs


def _adapter(done: Done) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return dict(load_file(done.run.adapter("sft") / "adapter_model.safetensors"))


def _apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference, as a share of the largest weight; 0 for the same numbers."""
    largest = max(float(weight.abs().max()) for weight in one.values())
    return max(float((weight - other[name]).abs().max()) for name, weight in one.items()) / largest
