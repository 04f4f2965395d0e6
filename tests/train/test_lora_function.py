"""Adapters computed together with their base layers give what PEFT's own layers give."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from medtrain.train import lora_function
from tests.train.lora_block import Block, Shape, assert_close, both, gradients, step, x_of

_SIZE = st.integers(1, 5).map(lambda n: 8 * n)


_SHAPES: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries({
    "inputs": _SIZE,
    "outputs": st.tuples(_SIZE, _SIZE, _SIZE),
    "ranks": st.tuples(*[st.integers(1, 6)] * 3),
    "bias": st.booleans(),
    "quantized": st.booleans(),
    "rslora": st.booleans(),
})  # fmt: skip


@settings(max_examples=25)
@given(
    shape=_SHAPES.map(lambda fields: Shape(**fields)),
    size=st.lists(st.integers(1, 6), min_size=1, max_size=3),
)
def test_outputs_and_gradients_are_those_of_peft(shape: Shape, size: list[int]) -> None:
    plain, fused = both(Block, shape)
    dtype = torch.float32 if shape.quantized else torch.float64
    for longer in (0, 1):
        x = x_of(shape, *size[:-1], size[-1] + longer).to(dtype)
        found, wanted = step(fused.to(dtype), x), step(plain.to(dtype), x)
        assert_close(found, wanted, 100 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("bytes_kept", [False, True], ids=["as-on-a-cpu", "as-on-a-gpu"])
def test_with_the_same_mask_dropout_is_that_of_peft(
    quantized: bool, bytes_kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = Shape(quantized=quantized, dropout=0.25)
    plain, fused = both(Block, shape)

    def kept(x: torch.Tensor) -> torch.Tensor:
        return torch.rand(x.shape, generator=torch.Generator().manual_seed(x.shape[-1])) > 0.25

    def dropped(x: torch.Tensor, share: float) -> Any:
        mask = kept(x)
        return x * (mask / 0.75), mask if bytes_kept else mask / 0.75

    monkeypatch.setattr(lora_function, "_dropped", dropped)
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, *_: x * (kept(x) / 0.75))
    assert_close(step(fused.train(), x_of(shape)), step(plain.train(), x_of(shape)))


def test_a_layer_alone_draws_what_peft_draws() -> None:
    shape = Shape(dropout=0.3)
    plain, fused = both(Block, shape)
    x = x_of(shape, 200)
    found = []
    for model in (plain, fused):
        layer = model.base_model.model.o_proj
        torch.manual_seed(8)
        found.append(layer(torch.ones(40, sum(shape.outputs))))
    assert torch.allclose(found[0], found[1], atol=1e-6)
    torch.manual_seed(8)
    first = fused(x)
    assert not torch.equal(first, fused(x))
    torch.manual_seed(8)
    assert torch.equal(first, fused(x))


def test_dropout_on_a_gpu_drops_the_share_and_scales_the_rest() -> None:
    x = torch.ones(400, 50)
    for dropped, mask in (
        lora_function._dropped(x, 0.2),
        torch.native_dropout(x, 0.2, train=True),
    ):
        assert mask is not None
        setting = lora_function.Setting((), 0.2, torch.float32)
        assert torch.equal(lora_function._masked(x, mask, setting), dropped)
        assert set(dropped.flatten().tolist()) == {0, 1.25}
        assert dropped.mean() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_and_dropout(mode: Any, quantized: bool) -> None:
    shape = Shape(quantized=quantized, dropout=0.5)
    plain, fused = both(Block, shape)
    with mode():
        found, wanted = fused.eval()(x_of(shape)), plain.eval()(x_of(shape))
    assert torch.allclose(found, wanted, atol=1e-6)
    assert not found.requires_grad
    fused.train()
    assert step(fused, x_of(shape))["x"] is not None


def test_inputs_without_a_gradient_get_none() -> None:
    shape = Shape(quantized=True)
    plain, fused = both(Block, shape)
    for model in (plain, fused):
        model(x_of(shape)).sum().backward()
    assert_close(gradients(fused), gradients(plain))


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given_dtype", [torch.float32, None])
def test_autocast_rounds_no_more_than_with_peft(
    dtype: torch.dtype, given_dtype: torch.dtype | None, quantized: bool
) -> None:
    shape = Shape(inputs=64, outputs=(64, 64, 64), quantized=quantized)
    plain, fused = both(Block, shape)
    x = x_of(shape, 64)
    exact = step(plain, x)

    def call(model: Any, x: torch.Tensor) -> Any:
        with torch.autocast("cpu", dtype):
            return model(x.to(given_dtype or dtype))

    wanted, found = step(plain, x, call), step(fused, x, call)
    for name, true in exact.items():
        assert found[name].dtype == wanted[name].dtype, name
        ours = (found[name].float() - true).norm()
        assert ours <= 1.25 * (wanted[name].float() - true).norm() + 1e-3 * true.norm(), name


def test_weights_that_were_written_without_a_trace_are_seen() -> None:
    shape = Shape()
    plain, fused = both(Block, shape)
    with torch.autocast("cpu", torch.bfloat16):
        before = fused(x_of(shape))
        for model in (plain, fused):
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.data.mul_(2)
        after = fused(x_of(shape))
        assert not torch.equal(before, after)
        assert torch.allclose(after, plain(x_of(shape)), atol=0.1)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_activation_checkpointing_changes_nothing(
    reentrant: bool, quantized: bool, autocast: bool
) -> None:
    shape = Shape(quantized=quantized, dropout=0.2)
    _, fused = both(Block, shape)
    found = []
    for call in (None, functools.partial(checkpoint, use_reentrant=reentrant)):
        torch.manual_seed(11)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found.append(step(fused, x_of(shape), call))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


class _Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what would be a kernel on a GPU: neither views nor mere memory."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        self.count += not func.is_view and name not in _NO_KERNEL
        return func(*args, **(kwargs or {}))


_NO_KERNEL = {"empty", "empty_like", "new_empty", "detach", "_unsafe_view", "empty_strided"}


@pytest.mark.parametrize(("dropout", "most"), [(0.0, 35), (0.05, 45)])
def test_layers_are_computed_in_few_launches(dropout: float, most: int) -> None:
    counts = []
    for model in both(Block, Shape(dropout=dropout)):
        for name, parameter in model.named_parameters():
            if "lora_" not in name:
                parameter.data = parameter.data.bfloat16()
        x = x_of(Shape()).bfloat16().requires_grad_()
        with _Launches() as launches:
            with torch.autocast("cpu", torch.bfloat16):
                output = model(x)
            output.sum().backward()
        counts.append(launches.count)
    plain, fused = counts
    assert fused <= most < plain / 2, counts
