"""Rows side by side in one sequence give what each gives alone, by every kernel that there is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.utils import send_to_device

from medtrain.attention.choice import Kernel, choose
from medtrain.attention.families import FAMILIES
from medtrain.attention.kernels import attend_by
from medtrain.attention.trial import Shape, distance_from_rows, facts_of, settled
from medtrain.train.loader import supervised_batch
from medtrain.train.packed import PackedForward
from medtrain.train.rows import IGNORED
from tests.gpu.models import PAD, VOCAB, WINDOW, packed_model, plain_model

pytestmark = pytest.mark.gpu
LENGTHS = (3 * WINDOW, 5, WINDOW, 2, WINDOW + 1, 40)
"""Some beyond the window of families that have one."""
Found = tuple[torch.Tensor, torch.Tensor]
"""Log-probabilities of all answers' tokens, and gradients of all weights."""


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_float32_is_exact(family: str, device: torch.device) -> None:
    alone, packed = (f(family, device, torch.float32) for f in (each_alone, all_packed))
    for one, other in zip(alone, packed, strict=True):
        assert one.norm() > 0
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-3 * float(one.abs().max()))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_16_bits_are_off_by_rounding_alone(family: str, device: torch.device) -> None:
    """No further from float32 than twice what the rows alone are."""
    exact, alone, packed = (
        each_alone(family, device, torch.float32),
        each_alone(family, device, torch.bfloat16),
        all_packed(family, device, torch.bfloat16),
    )
    for true, one, other in zip(exact, alone, packed, strict=True):
        rounding = float((one - true).norm() / true.norm())
        assert float((other - true).norm() / true.norm()) <= 2 * rounding + 1e-3


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_neighbours_are_not_seen(family: str, device: torch.device) -> None:
    model = packed_model(family, device, torch.float32)
    others = [row_of(length, seed=100 + i) for i, length in enumerate(LENGTHS)]
    ours = rows()
    mixed = [ours[i] if i == 2 else other for i, other in enumerate(others)]
    with torch.no_grad():
        first, second = (forward(model, each, device).log_probs[2] for each in (ours, mixed))
    length = LENGTHS[2] - 1
    torch.testing.assert_close(first[:length], second[:length], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 64), (8, 2, 128), (6, 1, 80)])
@pytest.mark.parametrize("windowed", [False, True])
def test_every_kernel_gives_what_row_by_row_gives(
    device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int,
    windowed: bool,
) -> None:  # fmt: skip
    shape = Shape(device, dtype, heads, kv_heads, head_dim, windowed)
    offered: list[Kernel] = [choice.kernel for choice in choose(facts_of(shape))]
    allowed = 2e-2 if dtype == torch.bfloat16 else 1e-4
    for kernel in offered:
        for window in (None, 7, 1000) if windowed else (None,):
            try:
                distance = distance_from_rows(attend_by(kernel), shape, window)
            except Exception:  # as a card may refuse a shape, but then nobody takes it
                assert settled(shape).kernel != kernel
                continue
            assert distance <= allowed, (kernel, window)


def test_a_card_of_this_century_packs_in_one_call(card: torch.device) -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("flash attention begins with compute capability 8.0")
    choice = settled(Shape(card, torch.bfloat16, 32, 8, 128, False))
    assert choice.kernel != "rows", choice.reason


# What is compared


def row_of(length: int, *, seed: int) -> dict[str, Any]:
    drawn = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (length,), generator=drawn).tolist()
    prompt = length // 2
    return {"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]}


def rows() -> list[dict[str, Any]]:
    return [row_of(length, seed=i) for i, length in enumerate(LENGTHS)]


def forward(model: Any, batch: list[dict[str, Any]], device: torch.device) -> Any:
    inputs = send_to_device(supervised_batch(PAD, packed=True)(batch), device)
    return PackedForward(model)(**inputs, fused_lm_head=True, use_cache=False)


def all_packed(family: str, device: torch.device, dtype: torch.dtype) -> Found:
    model = packed_model(family, device, dtype)
    outputs = forward(model, rows(), device)
    scored = outputs.log_probs[outputs.label_mask.bool()]
    return scored.detach().float(), gradients(model, scored.float().sum())


def each_alone(family: str, device: torch.device, dtype: torch.dtype) -> Found:
    model = plain_model(family, device, dtype)
    found = []
    for row in rows():
        ids = torch.tensor(row["input_ids"], device=device)
        logits = model(ids[None], use_cache=False).logits[0, :-1].float()
        chosen = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        found.append(chosen[torch.tensor(row["labels"][1:], device=device) != IGNORED])
    scored = torch.cat(found)
    return scored.detach(), gradients(model, scored.sum())


def gradients(model: Any, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return torch.cat([grads[name].float().flatten() for name in sorted(grads)])
