"""The errors that ended attempts, for whoever decides whether trying again makes sense."""

from __future__ import annotations

import json
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from medtrain.errors import as_medtrain_error
from medtrain.files import write_json
from medtrain.shards.shard_files import AttemptFiles, ShardFiles, shards_root


@dataclass(frozen=True, slots=True)
class ShardFailure:
    """Why an attempt at a shard failed."""

    shard: int
    attempt: str
    exit_code: int
    """As in `medtrain.errors`: tells what trying again can mend."""
    message: str
    fix: str
    host: str
    at: float
    """Seconds since the epoch."""


def write_failure(shard: int, files: AttemptFiles, error: Exception) -> None:
    """Leave the error beside the attempt's journal; where even that is impossible, go without."""
    known = as_medtrain_error(error)
    failure = ShardFailure(
        shard=shard,
        attempt=files.name,
        exit_code=known.exit_code,
        message=known.message,
        fix=known.fix,
        host=socket.gethostname(),
        at=time.time(),
    )
    with suppress(OSError):
        write_json(files.failure, asdict(failure))


def shard_failures(directory: Path) -> list[ShardFailure]:
    """The failures of a stage's shards that have no receipt yet, the oldest first."""
    found: list[ShardFailure] = []
    for root in sorted(shards_root(directory).glob("[0-9]*")):
        files = ShardFiles(directory, int(root.name))
        if not files.done.exists():
            failures = (_read(attempt.failure) for attempt in files.attempts())
            found += [failure for failure in failures if failure is not None]
    return sorted(found, key=lambda failure: failure.at)


def _read(path: Path) -> ShardFailure | None:
    try:
        tree = json.loads(path.read_bytes())
        return ShardFailure(**{field.name: tree[field.name] for field in fields(ShardFailure)})
    except (OSError, ValueError, KeyError, TypeError):
        return None
