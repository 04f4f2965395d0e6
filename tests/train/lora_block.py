"""Linear layers with adapters, as PEFT computes them and fused; and what is compared of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model

from medtrain.train import lora_function
from medtrain.train.fused_lora import fuse

_ORDER_OF_SUMS = 3e-6
"""Of the largest value: the same float32 sums in two orders."""


class Shape(NamedTuple):
    """What a block of layers is like."""

    inputs: int = 32
    outputs: tuple[int, int, int] = (32, 16, 24)
    ranks: tuple[int, int, int] = (4, 4, 4)
    bias: bool = False
    quantized: bool = False
    rslora: bool = False
    dropout: float = 0.0
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    """Of the base."""


class Block(torch.nn.Module):
    """Three layers that read one tensor, and one that reads what they make of it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (
            _linear(shape.inputs, outputs, shape) for outputs in shape.outputs
        )
        self.o_proj = _linear(sum(shape.outputs), shape.inputs, shape)
        self.is_loaded_in_4bit = shape.quantized

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        together = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        result: torch.Tensor = self.o_proj(torch.tanh(torch.cat(together, dim=-1)))
        return result


class TwoReaders(Block):
    """Queries of one tensor, keys and values of another, as in attention across two sequences."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        other = x.sin()
        together = [self.q_proj(x), self.k_proj(other), self.v_proj(other)]
        result: torch.Tensor = self.o_proj(torch.tanh(torch.cat(together, dim=-1)))
        return result


def _linear(inputs: int, outputs: int, shape: Shape) -> torch.nn.Module:
    if not shape.quantized:
        return torch.nn.Linear(inputs, outputs, bias=shape.bias).to(shape.device, shape.dtype)
    layer = bitsandbytes.nn.Linear4bit(inputs, outputs, bias=shape.bias, quant_type="nf4")
    layer.support_avx512bf16_for_cpu = False
    quantized: torch.nn.Module = layer.to(shape.dtype).to(shape.device)
    return quantized


def adapted(module: torch.nn.Module, shape: Shape = Shape(), **options: Any) -> Any:  # noqa: B008
    """PEFT's layers around a module's, as if trained for a while."""
    names = [name for name, one in module.named_modules() if isinstance(one, torch.nn.Linear)]
    pattern = dict(zip(("q_proj", "k_proj", "v_proj"), shape.ranks, strict=True))
    config = LoraConfig(
        r=shape.ranks[0], lora_alpha=12, lora_dropout=shape.dropout, target_modules=names,
        rank_pattern=pattern, use_rslora=shape.rslora, **options,
    )  # fmt: skip
    model = get_peft_model(module, config)
    train_a_while(model)
    return model


def train_a_while(model: Any) -> None:
    draws = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            drawn = torch.randn(parameter.shape, generator=draws) * 0.1
            parameter.data = drawn.to(parameter.device)


def both(kind: type[Block], shape: Shape, **options: Any) -> tuple[Any, Any]:
    """The same layers twice: PEFT's way and fused."""
    torch.manual_seed(2)
    plain = adapted(kind(shape), shape, **options)
    fused = copy.deepcopy(plain)
    result = fuse(fused)
    assert result.layers == 4
    assert not result.plain
    return plain, fused


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def step(model: Any, x: torch.Tensor, call: Callable[..., Any] | None = None) -> dict[str, Any]:
    """Output and gradients, x's among them."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    output = call(model, x) if call else model(x)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(4))
    (output * weights.to(output.device)).sum().backward()
    return {"output": output.detach(), "x": x.grad, **gradients(model)}


def assert_close(
    found: dict[str, Any], expected: dict[str, Any], tolerance: float = _ORDER_OF_SUMS
) -> None:
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert found[name].dtype == wanted.dtype, name
        distance = (found[name] - wanted).abs().max()
        assert distance <= tolerance * wanted.abs().max().clamp(min=1), (name, distance)


def x_of(shape: Shape, *size: int) -> torch.Tensor:
    return torch.randn(*(size or (2, 5)), shape.inputs, generator=torch.Generator().manual_seed(3))


@contextmanager
def computed() -> Iterator[list[int]]:
    """How many layers each computation was of."""
    sizes: list[int] = []
    apply = lora_function.AdaptedLayers.apply

    def counting(setting: Any, *tensors: Any) -> Any:
        sizes.append(len(setting.layers))
        return apply(setting, *tensors)  # type: ignore[no-untyped-call]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(lora_function.AdaptedLayers, "apply", counting)
        yield sizes
