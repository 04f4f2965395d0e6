"""A vocabulary grown to the chat format's tokens: rows of embedding and output layer.

base of `base_vocab_rows` rows → `vocab_rows` → the new ones computed from the old, the same in
every stage and on every device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from medtrain.errors import DataError

if TYPE_CHECKING:
    from medtrain.data.chat import ChatTokenizer

NEW_ROW_SPREAD = 0.05
"""How far a new row lies from the mean row, in standard deviations of the old rows."""
_ROWS_AT_A_TIME = 1_024


def grow(model: Any, chat: ChatTokenizer) -> None:
    """Give the model `chat.vocab_rows` rows; every stage computes the same new ones.

    Raises:
        DataError: the tokenizer was prepared for another base.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if rows != chat.base_vocab_rows:
        raise DataError(
            f"The tokenizer was prepared for a base of {chat.base_vocab_rows} vocabulary rows, "
            f"but {model.name_or_path} has {rows}",
            fix="The base was changed after `medtrain prepare`: run prepare again.",
        )
    if rows == chat.vocab_rows:
        return
    model.resize_token_embeddings(chat.vocab_rows, mean_resizing=False)
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = {id(layer.weight): layer.weight for layer in layers if layer is not None}
    for weight in weights.values():
        _fill_new_rows(weight.data, rows)
    if layers[1] is not None and getattr(layers[1], "bias", None) is not None:
        layers[1].bias.data[rows:] = layers[1].bias.data[:rows].mean()


def _fill_new_rows(weight: torch.Tensor, old_rows: int) -> None:
    """Set the rows from `old_rows` on to the mean old row plus a little noise of their own.

    The mean keeps the new tokens from taking probability from the old ones before they are trained
    (J. Hewitt, https://nlp.stanford.edu/~johnhew/vocab-expansion.html); the noise, seeded by the
    row's number, tells them apart. Sums are in float64 on the CPU, so that the dtype and the
    device of the model do not show.

    Args:
        weight: (vocabulary rows, hidden size), changed in place.
        old_rows: how many rows came with the base.
    """
    hidden = weight.shape[1]
    total = torch.zeros(hidden, dtype=torch.float64)
    squares = torch.zeros(hidden, dtype=torch.float64)
    for start in range(0, old_rows, _ROWS_AT_A_TIME):
        chunk = weight[start : min(start + _ROWS_AT_A_TIME, old_rows)].to("cpu", torch.float64)
        total += chunk.sum(dim=0)
        squares += chunk.square().sum(dim=0)
    mean = total / old_rows
    spread = (squares / old_rows - mean.square()).clamp(min=0).sqrt() * NEW_ROW_SPREAD
    for row in range(old_rows, weight.shape[0]):
        noise = torch.randn(
            hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(row)
        )
        weight[row] = (mean + spread * noise).to(weight.dtype)
