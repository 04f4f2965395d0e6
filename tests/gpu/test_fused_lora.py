"""Adapters computed together with their base layers, by a card's own kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.train.lora_block import Block, Shape, both, step, x_of

pytestmark = pytest.mark.gpu

ROUNDING = 0.02
"""Of the norm: what bfloat16's 8 bits leave of sums that are rounded at different places."""


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("reads", [torch.bfloat16, torch.float32])
def test_they_give_in_bfloat16_what_pefts_layers_give(
    quantized: bool, reads: torch.dtype, device: Any
) -> None:
    shape = Shape(inputs=256, outputs=(256, 64, 64), ranks=(16, 16, 16), quantized=quantized,
                  device=str(device), dtype=torch.bfloat16)  # fmt: skip
    plain, fused = both(Block, shape)

    def call(model: Any, x: torch.Tensor) -> Any:
        with torch.autocast(device.type, torch.bfloat16):
            return model(x.to(reads))

    x = x_of(shape, 300).to(device)
    found, wanted = step(fused, x, call), step(plain, x, call)
    assert found.keys() == wanted.keys()
    for name, expected in wanted.items():
        assert found[name].dtype == expected.dtype, name
        distance = (found[name] - expected).float().norm()
        assert distance <= ROUNDING * expected.float().norm(), name


def test_they_drop_the_same_again_after_the_same_seed(device: Any) -> None:
    shape = Shape(inputs=256, dropout=0.25, quantized=True, device=str(device))
    plain, fused = both(Block, shape)
    x = x_of(shape, 2_000).to(device)
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(step(fused, x))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    torch.manual_seed(3)
    wanted = step(plain, x)["output"]
    whole = step(plain.eval(), x)["output"]
    ours, theirs = (found[0]["output"] - whole).norm(), (wanted - whole).norm()
    assert float(ours) == pytest.approx(float(theirs), rel=0.1)
