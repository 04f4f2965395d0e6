"""The sizes of a base model, as far as memory depends on them.

model.base → `builtin:tiny`'s own sizes, or a directory's config.json, or that of the hub cache, or
a row of a small table for well-known names → Architecture → exact numbers of parameters by kind.
Nothing is downloaded and no library is loaded: a plan must be quick, and need no network.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from medtrain.config import RunConfig
from medtrain.errors import DataError
from medtrain.files import read_json

_CHATML = b"<|im_start|>"
_WITH_CHATML = ("tokenizer_config.json", "added_tokens.json", "tokenizer.json")


class Linear(NamedTuple):
    """The widths of a linear layer."""

    inputs: int
    outputs: int

    @property
    def weights(self) -> int:
        """Elements of its matrix."""
        return self.inputs * self.outputs


class Parameters(NamedTuple):
    """Elements of all tensors of a model, by kind."""

    embeddings: int
    attention: int
    mlp: int
    norms: int
    head: int
    """The output layer; 0 where it is the embedding matrix."""

    @property
    def total(self) -> int:
        """Of the whole model."""
        return sum(self)


@dataclass(frozen=True, slots=True)
class Architecture:
    """A decoder of Llama's kind: attention, gated MLP, two norms a layer."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False
    """Whether the output layer is the embedding matrix."""
    qkv_bias: bool = False
    output_bias: bool = False
    """Of attention's output projection."""
    mlp_bias: bool = False
    qk_norm: bool = False
    """Whether queries and keys have a norm of their own, as in Qwen3."""
    knows_chatml: bool = False
    """Whether the vocabulary has ChatML's two control tokens."""
    kind: str = "llama"
    """transformers' `model_type`; of well-known names one that is computed alike."""

    @property
    def linear(self) -> dict[str, Linear]:
        """The linear layers of one layer, which are quantised and may have an adapter."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": Linear(self.hidden, q),
            "k_proj": Linear(self.hidden, kv),
            "v_proj": Linear(self.hidden, kv),
            "o_proj": Linear(q, self.hidden),
            "gate_proj": Linear(self.hidden, self.intermediate),
            "up_proj": Linear(self.hidden, self.intermediate),
            "down_proj": Linear(self.intermediate, self.hidden),
        }

    @property
    def linear_weights(self) -> int:
        """Elements of the matrices of all layers."""
        return self.layers * sum(layer.weights for layer in self.linear.values())

    @property
    def embedding_weights(self) -> int:
        """Elements of the embedding matrix, and of the output layer's where it has its own."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> Parameters:
        """Exact numbers, as transformers builds the model."""
        linear = self.linear
        attention = sum(linear[f"{name}_proj"].weights for name in "qkvo")
        if self.qkv_bias:
            attention += sum(linear[f"{name}_proj"].outputs for name in "qkv")
        attention += self.hidden if self.output_bias else 0
        mlp = sum(linear[f"{name}_proj"].weights for name in ("gate", "up", "down"))
        mlp += 2 * self.intermediate + self.hidden if self.mlp_bias else 0
        norms = 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        return Parameters(
            embeddings=self.vocab * self.hidden,
            attention=self.layers * attention,
            mlp=self.layers * mlp,
            norms=self.layers * norms + self.hidden,
            head=0 if self.tied else self.vocab * self.hidden,
        )


TINY = Architecture(128, 384, 3, 4, 4, 32, 2048, tied=True)
"""`builtin:tiny` (medtrain.quickstart.base); a small set of texts gives it a smaller vocabulary."""

_LLAMA_2_13B = Architecture(5120, 13824, 40, 40, 40, 128, 32_000)
_LLAMA_3_70B = Architecture(8192, 28_672, 80, 64, 8, 128, 128_256)
_WELL_KNOWN: dict[str, Architecture] = {
    r"llama-3(\.1)?-8b": Architecture(4096, 14_336, 32, 32, 8, 128, 128_256),
    r"llama-3(\.[13])?-70b": _LLAMA_3_70B,
    r"llama-3\.2-1b": Architecture(2048, 8192, 16, 32, 8, 64, 128_256, tied=True),
    r"llama-3\.2-3b": Architecture(3072, 8192, 28, 24, 8, 128, 128_256, tied=True),
    r"llama-2-7b": Architecture(4096, 11_008, 32, 32, 32, 128, 32_000),
    r"llama-2-13b": _LLAMA_2_13B,
    r"llama-2-70b": replace(_LLAMA_3_70B, vocab=32_000),
    r"mistral-7b(-instruct)?-v0\.[12]|zephyr-7b-beta": Architecture(
        4096, 14_336, 32, 32, 8, 128, 32_000
    ),
    r"mistral-7b(-instruct)?-v0\.3": Architecture(4096, 14_336, 32, 32, 8, 128, 32_768),
    r"tinyllama-1\.1b": Architecture(2048, 5632, 22, 32, 4, 64, 32_000),
    r"smollm2-135m": Architecture(576, 1536, 30, 9, 3, 64, 49_152, tied=True, knows_chatml=True),
    r"smollm2-360m": Architecture(960, 2560, 32, 15, 5, 64, 49_152, tied=True, knows_chatml=True),
    r"smollm2-1\.7b": Architecture(
        2048, 8192, 24, 32, 32, 64, 49_152, tied=True, knows_chatml=True
    ),
    r"qwen2\.5-0\.5b": Architecture(
        896, 4864, 24, 14, 2, 64, 151_936, tied=True, qkv_bias=True, knows_chatml=True
    ),
    r"qwen2\.5-7b": Architecture(
        3584, 18_944, 28, 28, 4, 128, 152_064, qkv_bias=True, knows_chatml=True
    ),
}
"""By what is in the name, case aside; sizes as in each model's config.json."""

_BIASES: dict[str, dict[str, bool]] = {
    "llama": {}, "mistral": {}, "smollm3": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
}  # fmt: skip
"""Kinds of models (`model_type`) that the sums above hold for, and what sets them apart."""


def architecture_of(config: RunConfig, base_directory: Path | None = None) -> Architecture | None:
    """The sizes of the base, or None where nothing at hand tells them.

    Args:
        config: names the base.
        base_directory: where it lies, for those who know better than `model.base`.
    """
    base = config.model.base
    directory = base_directory or Path(base).expanduser()
    if not (directory / "config.json").is_file():
        if base == "builtin:tiny":
            return TINY
        directory = _in_hub_cache(base, config.model.revision) or directory
    if (directory / "config.json").is_file():
        return from_directory(directory)
    name = directory.name.lower()
    return next((sizes for known, sizes in _WELL_KNOWN.items() if re.search(known, name)), None)


def from_directory(directory: Path) -> Architecture | None:
    """The sizes that a model directory's config.json names; None for other kinds of models."""
    try:
        tree = read_json(directory / "config.json")
        found = from_config(tree)
    except (OSError, DataError, KeyError, TypeError, ValueError, AttributeError):
        return None  # whoever loads it says what is wrong with it
    return found and replace(found, knows_chatml=_knows_chatml(directory))


def from_config(tree: Mapping[str, Any]) -> Architecture | None:
    """The sizes in a config.json of transformers; None for a kind of model that is not known.

    Raises:
        KeyError: a size is missing.
    """
    kind = tree.get("model_type")
    if kind not in _BIASES:
        return None
    heads, hidden = int(tree["num_attention_heads"]), int(tree["hidden_size"])
    biases = dict(_BIASES[kind])
    if tree.get("attention_bias"):
        biases |= {"qkv_bias": True, "output_bias": True}
    return Architecture(
        hidden=hidden,
        intermediate=int(tree["intermediate_size"]),
        layers=int(tree["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(tree.get("num_key_value_heads") or heads),
        head_dim=int(tree.get("head_dim") or (128 if kind == "qwen3" else hidden // heads)),
        vocab=int(tree["vocab_size"]),
        tied=bool(tree.get("tie_word_embeddings", kind == "smollm3")),
        mlp_bias=bool(tree.get("mlp_bias", False)),
        kind=kind,
        **biases,
    )


def _knows_chatml(directory: Path) -> bool:
    files = (directory / name for name in _WITH_CHATML)
    return any(_CHATML in file.read_bytes() for file in files if file.is_file())


def _in_hub_cache(name: str, revision: str | None) -> Path | None:
    """Where the hub's cache has a model; laid out as huggingface_hub's guide says
    (https://huggingface.co/docs/huggingface_hub/guides/manage-cache)."""
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    repository = cache / f"models--{name.replace('/', '--')}"
    try:
        commit = (repository / "refs" / (revision or "main")).read_text("utf-8").strip()
    except OSError:
        commit = revision or ""
    found = repository / "snapshots" / commit
    return found if commit and found.is_dir() else None
