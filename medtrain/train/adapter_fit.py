"""Whether an adapter belongs on a model: refused before its weights are read.

the facts that medtrain wrote beside it → the same vocabulary and base? → shapes in the header of
its weights file → those of the model's embeddings?
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from medtrain.errors import AdapterMismatchError, DataError
from medtrain.files import read_json

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
FACTS_FILE = "medtrain_adapter.json"

_EMBEDDING_KEYS = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out")


class AdapterFacts(NamedTuple):
    """What medtrain writes beside an adapter, to recognise the base it belongs on."""

    base: str
    """As in `model.base`."""
    revision: str | None
    vocab_rows: int
    """Embedding rows of the model it was trained on, grown ones included."""
    new_token_ids: list[int]
    """Rows that were trained whole."""
    stage: str


def check_facts(model: Any, adapter_dir: Path) -> None:
    """Compare what medtrain wrote beside the adapter with the model at hand.

    Raises:
        AdapterMismatchError: it belongs on another base, or on another vocabulary.
    """
    if not (adapter_dir / FACTS_FILE).is_file():
        return
    facts = AdapterFacts(**read_json(adapter_dir / FACTS_FILE))
    rows = model.get_input_embeddings().weight.shape[0]
    here = str(model.name_or_path)
    if facts.vocab_rows != rows:
        raise _wrong_vocabulary(adapter_dir, facts.vocab_rows, here, rows)
    both_on_the_hub = not Path(here).exists() and not Path(facts.base).exists()
    if both_on_the_hub and facts.base != here and not facts.base.startswith("builtin:"):
        raise AdapterMismatchError(
            f"The adapter {adapter_dir} was trained on {facts.base}, not on {here}",
            fix=f"Set model.base={facts.base}, or train the adapter again on {here}.",
        )


def check_vocabulary(model: Any, adapter_dir: Path, config: Any) -> None:
    """Look for the classic mismatch in the header of the weights file, without reading it.

    Args:
        model: that the adapter is to be put on.
        adapter_dir: holds it.
        config: PEFT's, of the adapter.

    Raises:
        DataError: the weights cannot be read.
        AdapterMismatchError: the adapter was made for another vocabulary or width.
    """
    rows, hidden = model.get_input_embeddings().weight.shape
    here = str(model.name_or_path)
    indices = getattr(config, "trainable_token_indices", None) or {}
    lists = indices.values() if isinstance(indices, dict) else [indices]
    highest = max((max(ids) for ids in lists if ids), default=-1)
    if highest >= rows:
        raise _wrong_vocabulary(adapter_dir, highest + 1, here, rows)
    for key, shape in _shapes(adapter_dir):
        if "trainable_tokens" in key and shape[1] != hidden:
            raise AdapterMismatchError(
                f"The adapter {adapter_dir} was trained on a model of hidden size {shape[1]}, "
                f"but {here} has {hidden}",
                fix="Load it on the base it was trained on, or train it again on this one.",
            )
        whole = key.endswith(".weight") and key.split(".")[-2] in _EMBEDDING_KEYS
        if whole and shape[0] != rows:
            raise _wrong_vocabulary(adapter_dir, shape[0], here, rows)


def _shapes(adapter_dir: Path) -> Iterator[tuple[str, list[int]]]:
    try:
        with safe_open(adapter_dir / WEIGHTS_FILE, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118 - not a dict
                yield key, weights.get_slice(key).get_shape()
    except (OSError, SafetensorError) as error:
        raise DataError(f"{adapter_dir / WEIGHTS_FILE} cannot be read: {error}") from error


def _wrong_vocabulary(adapter_dir: Path, theirs: int, base: str, here: int) -> AdapterMismatchError:
    return AdapterMismatchError(
        f"The adapter {adapter_dir} was trained on a vocabulary of {theirs} rows, "
        f"but {base} has {here}",
        fix="Use the base and the chat template it was trained with, or train it again.",
    )
