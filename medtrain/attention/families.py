"""Models whose rows can lie side by side in one sequence, each attending to itself alone."""

from __future__ import annotations

from typing import Any

FAMILIES = frozenset({
    "llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "smollm3", "olmo2", "granite", "cohere",
    "starcoder2", "helium", "glm", "glm4", "ministral",
})  # fmt: skip
"""Kinds (`model_type`) that mix tokens by attention through transformers' interface alone, hand
keyword arguments on to it, windows included, and whose positions come from `position_ids`."""


def why_not_packed(config: Any) -> str | None:
    """Why a model's rows cannot be kept apart in one sequence; None where they can.

    Args:
        config: transformers' configuration of the model.
    """
    if config.model_type not in FAMILIES:
        return f"{config.model_type} is not known to keep rows apart in one sequence"
    if getattr(config, "attention_dropout", 0.0):
        return "its attention drops out, which packed rows' does not"
    return None
