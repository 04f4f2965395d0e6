"""Puts the fused computation (medtrain.train.lora_function) under PEFT's layers.

PeftModel → its LoRA layers, those that do not fit named with the reason → layers that read the same
tensor (q/k/v, gate/up) in groups → `forward` of each replaced. Nothing else changes: modules,
names, weights, and what is saved or merged are PEFT's.

The first layer of a group that is called computes all of them; the others' outputs wait for the
calls that follow with the same tensor. A model that does not call them so has its group taken apart
for good. A layer whose adapter is switched off, merged, sharded or not alone when it is called
takes PEFT's path for that call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer

from medtrain.config import RunConfig
from medtrain.config.lora_path import not_possible, why_not_fused
from medtrain.console import Console
from medtrain.train.lora_function import Adapted, AdaptedLayers, Setting

_READ_ALIKE = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
"""Names of siblings that models call with one tensor."""


class Fused(NamedTuple):
    """What became of a model's LoRA layers."""

    layers: int
    """Computed together with their base."""
    plain: dict[str, str]
    """Why not, by path: PEFT's own path."""
    reason: str | None = None
    """Why none was tried."""


def fuse_where_it_fits(model: Any, config: RunConfig, strategy: str) -> Fused:
    """Fuse a PeftModel's adapter `default`, if the settings allow it.

    Args:
        model: a PeftModel, its base frozen.
        config: the run's, of which `train.fused_lora` decides.
        strategy: that training is launched with.

    Raises:
        ConfigError: `train.fused_lora` is true, and a layer does not fit.
    """
    reason = why_not_fused(config, strategy)
    if reason is not None:
        return Fused(0, {}, reason)
    fused = fuse(model)
    if config.train.fused_lora is True and fused.plain:
        path, why = next(iter(fused.plain.items()))
        raise not_possible(f"{path}: {why}")
    return fused


def tell_lora(fused: Fused, stage: str, console: Console) -> None:
    """Write down which path a stage's adapters take."""
    if fused.reason is not None:
        console.log_only("lora", stage=stage, by="peft", reason=fused.reason)
        return
    why = "; ".join(sorted(set(fused.plain.values())))
    console.log_only(
        "lora", stage=stage, by="fused", layers=fused.layers, peft=len(fused.plain), reason=why
    )


def fuse(model: Any, *, name: str = "default") -> Fused:
    """Replace the forward of every LoRA layer that fits.

    Args:
        model: holds PEFT's layers.
        name: of the adapter that is computed.
    """
    plain: dict[str, str] = {}
    by_parent: dict[str, dict[str, LoraLinear]] = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if (why := why_not_this_layer(layer, name)) is not None:
            plain[path] = why
        else:
            parent, _, leaf = path.rpartition(".")
            by_parent.setdefault(parent, {})[leaf] = layer
    for siblings in by_parent.values():
        for layers in _groups(siblings, name):
            group = _Group()
            group.members = tuple(_Member(layer, name, group) for layer in layers)
            for member in group.members:
                member.layer.forward = member.forward
    return Fused(sum(map(len, by_parent.values())), plain)


def why_not_this_layer(layer: Any, name: str = "default") -> str | None:
    """Why a LoRA layer keeps PEFT's path; None where it fits."""
    kind, base = type(layer).__name__, layer.get_base_layer()
    if type(layer) is not LoraLinear and kind != "Linear4bit":
        return f"PEFT's {kind} is no linear layer with 4, 16 or 32-bit weights"
    if type(base).__name__ not in ("Linear", "Linear4bit") or layer.base_layer is not base:
        return f"its base is a {type(base).__name__}"
    if name not in layer.lora_A:
        return f"it has no adapter {name}"
    if layer.lora_variant.get(name) is not None:
        return f"its adapter is a {type(layer.lora_variant[name]).__name__}"
    if layer.lora_bias.get(name):
        return "its adapter has a bias"
    if type(layer.lora_dropout[name]) not in (torch.nn.Dropout, torch.nn.Identity):
        return f"its dropout is a {type(layer.lora_dropout[name]).__name__}"
    if _dropout_of(layer, name) == 1:
        return "its dropout leaves nothing"
    if any(parameter.requires_grad for parameter in base.parameters()):
        return "its base is trained"
    return None


def _dropout_of(layer: Any, name: str) -> float:
    return float(getattr(layer.lora_dropout[name], "p", 0.0))


def _groups(siblings: dict[str, LoraLinear], name: str) -> Iterator[Sequence[LoraLinear]]:
    """Layers under one parent that read the same tensor; most are alone."""
    left = dict(siblings)
    for names in _READ_ALIKE:
        alike = [left.pop(leaf) for leaf in names if leaf in left]
        if len({(one.in_features, _dropout_of(one, name)) for one in alike}) == 1:
            yield alike
        else:
            yield from ([one] for one in alike)
    yield from ([one] for one in left.values())


class _Member:
    """A layer, and how it is called."""

    def __init__(self, layer: LoraLinear, name: str, group: _Group) -> None:
        self.layer, self._name, self._group = layer, name, group
        self._quantized = type(layer.base_layer).__name__ == "Linear4bit"

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """In place of PEFT's."""
        if not args and not kwargs:
            waiting = self._group.take(self, x)
            if waiting is not None:
                return waiting
            dtype = self.dtype_for(x)
            if dtype is not None:
                return self._group.compute(self, x, dtype)
        plain: torch.Tensor = type(self.layer).forward(self.layer, x, *args, **kwargs)
        return plain

    def dtype_for(self, x: torch.Tensor) -> torch.dtype | None:
        """In which dtype the fused path computes x now; None where it does not."""
        layer = self.layer
        if layer.disable_adapters or layer.merged or layer.active_adapters != [self._name]:
            return None
        down, base = layer.lora_A[self._name].weight, layer.base_layer
        if _is_sharded(down) or _is_sharded(base.weight) or not x.is_floating_point():
            return None
        device = x.device.type
        if self._quantized and device == "cpu" and base.support_avx512bf16_for_cpu:
            return None  # bitsandbytes repacks such weights in evaluation mode
        if torch.is_autocast_enabled(device):
            dtype: torch.dtype = torch.get_autocast_dtype(device)
            return dtype
        stored = base.compute_dtype if self._quantized else base.weight.dtype
        return x.dtype if x.dtype == down.dtype and stored in (x.dtype, None) else None

    @property
    def weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B as they are now."""
        return self.layer.lora_A[self._name].weight, self.layer.lora_B[self._name].weight

    @property
    def adapted(self) -> Adapted:
        """As the computation takes it."""
        layer = self.layer
        return Adapted(layer.base_layer, layer.scaling[self._name], self._quantized)

    @property
    def dropout(self) -> float:
        """Share that is dropped now."""
        dropout = self.layer.lora_dropout[self._name]
        return float(dropout.p) if dropout.training and hasattr(dropout, "p") else 0.0


class _Group:
    """Layers that are expected to be called one after another with the same tensor.

    Taken apart, its first layer draws what it drew before: nothing of a mask depends on how many
    layers it is for, so that a run that is gone on with draws what one without a break draws.
    """

    members: tuple[_Member, ...]

    def __init__(self) -> None:
        self._waiting: dict[_Member, torch.Tensor] = {}
        self._read: tuple[Any, ...] = ()
        self._was_whole = False
        self._alone = False

    def take(self, member: _Member, x: torch.Tensor) -> torch.Tensor | None:
        """The output that waits for a member called with x; None where none does."""
        if not self._waiting:
            return None
        if self._read[0] is x and self._read[1:] == _state_of(x) and member in self._waiting:
            output = self._waiting.pop(member)
            if not self._waiting:
                self._read, self._was_whole = (), True
            return output
        # A pass that was left in the middle, by activation checkpointing or an error, says
        # nothing about a model that has called all members before.
        self._alone = not self._was_whole
        self._waiting, self._read = {}, ()
        return None

    def compute(self, member: _Member, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The output of a member; those of the others wait."""
        together = self.members
        if self._alone or any(o.dtype_for(x) != dtype for o in together if o is not member):
            together = (member,)
        outputs = _apply(together, x, dtype)
        waiting = dict(zip(together, outputs, strict=True))
        output = waiting.pop(member)
        if waiting:
            self._waiting, self._read = waiting, (x, *_state_of(x))
        return output


def _state_of(x: torch.Tensor) -> tuple[Any, ...]:
    """What must be the same for an output computed before to be the right one."""
    return (None if x.is_inference() else x._version, torch.is_grad_enabled())


def _apply(
    members: Sequence[_Member], x: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    setting = Setting(tuple(m.adapted for m in members), members[0].dropout, dtype)
    downs, ups = zip(*(m.weights for m in members), strict=True)
    outputs: tuple[torch.Tensor, ...] = AdaptedLayers.apply(  # type: ignore[no-untyped-call]
        setting, x, *downs, *ups
    )
    return outputs


def _is_sharded(weight: torch.Tensor) -> bool:
    """DeepSpeed's stage 3 marks weights; FSDP makes them tensors of another type."""
    return hasattr(weight, "ds_id") or hasattr(weight, "device_mesh")
