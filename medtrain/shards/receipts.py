"""The receipt of a shard: first publisher wins, and it is believed only as far as it holds.

rows in plan order → rows.jsonl → done.json. A receipt that does not hold is set aside, so that the
shard is published again from its journals; nothing is deleted.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from medtrain.errors import DataError, TryAgainError
from medtrain.files import publish, read_sealed, sealed
from medtrain.shards.plan import Layout
from medtrain.shards.shard_files import ShardFiles

_PUBLISH_TRIES = 5


def publish_receipt(layout: Layout, files: ShardFiles, receipt: Mapping[str, Any]) -> None:
    """Publish a shard's receipt; another one that stands already and holds is as good.

    Raises:
        TryAgainError: receipts of another plan keep appearing.
    """
    for _ in range(_PUBLISH_TRIES):
        if publish(files.done, sealed(receipt)):
            return
        if sound_receipt(layout, files.shard, files) is not None:
            return
    raise TryAgainError(
        f"{files.done} is written again and again by somebody who has another plan",
        fix="Cancel the older jobs of this run, then run the same command again.",
    )


def sound_receipt(layout: Layout, shard: int, files: ShardFiles) -> dict[str, Any] | None:
    """The shard's receipt, if it holds (see `receipt_that_holds`); otherwise it is set aside."""
    receipt = receipt_that_holds(layout, shard, files)
    if receipt is None:
        distrust(files)
    return receipt


def receipt_that_holds(layout: Layout, shard: int, files: ShardFiles) -> dict[str, Any] | None:
    """The shard's receipt, if it belongs to this layout and its file has the promised size."""
    try:
        receipt = read_sealed(files.done)
        if (
            receipt["plan_id"] == layout.plan_id
            and receipt["row_ids_digest"] == layout.digests[shard]
            and rows_path(files, receipt).stat().st_size == receipt["bytes"]
        ):
            return receipt
    except (FileNotFoundError, DataError, KeyError):
        return None
    return None


def rows_path(files: ShardFiles, receipt: Mapping[str, Any]) -> Path:
    """The result file that a receipt is for."""
    return files.attempt(receipt["attempt"]).rows


def distrust(files: ShardFiles) -> None:
    """Set a shard's receipt aside: its file does not hold what the receipt says."""
    with suppress(FileNotFoundError):
        files.done.rename(files.root / f"{files.done.name}.unsound-{uuid.uuid4().hex[:8]}")
