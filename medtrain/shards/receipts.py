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
    """The shard's receipt, if it holds (see `receipt_that_holds`); otherwise it is set aside.

    One that is absent is not: somebody may publish it at this moment.
    """
    receipt = _read(files)
    if receipt is None or _holds(receipt, layout, shard, files):
        return receipt
    distrust(files)
    return None


def receipt_that_holds(layout: Layout, shard: int, files: ShardFiles) -> dict[str, Any] | None:
    """The shard's receipt, if it belongs to this layout and its file has the promised size."""
    receipt = _read(files)
    return receipt if receipt and _holds(receipt, layout, shard, files) else None


def _read(files: ShardFiles) -> dict[str, Any] | None:
    """What stands where the receipt belongs: None if nothing does, empty if it is damaged."""
    try:
        return read_sealed(files.done)
    except FileNotFoundError:
        return None
    except DataError:
        return {}


def _holds(receipt: Mapping[str, Any], layout: Layout, shard: int, files: ShardFiles) -> bool:
    if (receipt.get("plan_id"), receipt.get("row_ids_digest")) != (
        layout.plan_id,
        layout.digests[shard],
    ):
        return False
    try:
        return bool(rows_path(files, receipt).stat().st_size == receipt["bytes"])
    except FileNotFoundError:
        return False


def rows_path(files: ShardFiles, receipt: Mapping[str, Any]) -> Path:
    """The result file that a receipt is for."""
    return files.attempt(receipt["attempt"]).rows


def distrust(files: ShardFiles, judged: Mapping[str, Any] | None = None) -> None:
    """Set a shard's receipt aside: its file does not hold what the receipt says.

    `judged` is the receipt that was found wanting, where finding out took long: another one that
    was published meanwhile stays.
    """
    if judged is not None and _read(files) != judged:
        return
    with suppress(FileNotFoundError):
        files.done.rename(files.root / f"{files.done.name}.unsound-{uuid.uuid4().hex[:8]}")
