"""A model's forward pass, called by the names that its signature has.

token ids, positions, mask, cache → logits of the next token. Models differ in what they take:
transformers calls the cache `cache` since 5.24 and forgets `past_key_values` in 5.40, models that
came with their own code still say the latter, and some know no positions.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor


class Forward:
    """One model."""

    def __init__(self, model: Any) -> None:
        accepted = inspect.signature(model.forward).parameters
        self.model = model
        self._takes_positions = "position_ids" in accepted
        self._cache_name = "cache" if "cache" in accepted else "past_key_values"
        # Without it the logits of all positions are computed, and all but the last thrown away.
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    def __call__(
        self, tokens: Tensor, positions: Tensor | None, mask: Tensor | None, cache: Any
    ) -> Tensor:
        """Run tokens, which the cache takes in.

        Args:
            tokens: (rows, new), int64.
            positions: (rows, new), int64; None counts from the cache's end, the same in every row.
            mask: (rows, cached + new), 1 for tokens; None where nothing is padded on the left.
            cache: of transformers' kind.

        Returns:
            (rows, vocabulary), the logits after each row's last token.
        """
        where = {}
        if self._takes_positions and positions is not None:
            where["position_ids"] = positions
        output = self.model(
            input_ids=tokens,
            attention_mask=mask,
            use_cache=True,
            **{self._cache_name: cache},
            **where,
            **self._options,
        )
        logits: Tensor = output.logits[:, -1]
        return logits
