"""The whole quickstart on a GPU, from the data to the report."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.gpu.commands import Done

pytestmark = pytest.mark.gpu
_NATS = 0.05
"""What rounding to 16 bits may make of a merge, for each token."""
_FIRST_LOSS = 0.02
"""What it may make of a mean over pairs; medtrain.train.rounding has the bound of each answer."""


@pytest.fixture
def whole(whole_run: Any) -> Done:
    done: Done = whole_run.result()
    assert done.code == 0, done.said
    return done


def test_the_quickstart_ends_well(whole: Done) -> None:
    assert (whole.run.root / "report" / "index.html").is_file()


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_merged_model_says_what_its_adapter_says(whole: Done, stage: str) -> None:
    counts = whole.receipt(f"merge-{stage}")["counts"]
    assert 0 <= counts["kl_nats"] < _NATS
    assert counts["top1_agreement"] > 0.9


def test_dpo_begins_at_ln_2(whole: Done) -> None:
    """Before its first step the policy is the reference, but for rounding, of which a run warns."""
    assert whole.losses("dpo")[0] == pytest.approx(math.log(2), abs=_FIRST_LOSS)
    assert "event=dpo_start" not in whole.run.log.read_text()
