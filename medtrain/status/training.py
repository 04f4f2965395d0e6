"""How far a training is: from its newest checkpoint, its metrics, and the lines of the run's log.

checkpoint → last step that is safe, number of steps; metrics → last step that was logged; log →
the same and when, from which comes the rate. Whatever is not there yet is not known yet.
"""

from __future__ import annotations

import json
import shlex
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import NamedTuple, cast

from medtrain.errors import DataError
from medtrain.files import read_json
from medtrain.run import Run, Trained
from medtrain.status.facts import Amount

_TAIL_BYTES = 1 << 16
_FRESH_S = 120.0
"""A log line older than this says nothing about how fast a training is now."""


class _Said(NamedTuple):
    """A progress line of the log."""

    at: float
    step: int
    total: int


def training_progress(run: Run, stage: str) -> Amount | None:
    """Steps done and to do; None before the first is known."""
    trained = cast("Trained", stage)
    said = _progress_lines(run.log, stage)
    checkpoint, total = _newest_checkpoint(run.checkpoints(trained))
    step = max(checkpoint, _last_logged_step(run.metrics(trained)), said[-1].step if said else 0)
    total = said[-1].total if said else total
    if not total:
        return None
    return Amount(min(step, total), total, "steps", per_s=_rate(said))


def newest_checkpoint(run: Run, stage: str) -> int:
    """The step of the newest checkpoint with a manifest; 0 without one."""
    return _newest_checkpoint(run.checkpoints(cast("Trained", stage)))[0]


def last_checkpoint_at(run: Run, stage: str) -> float | None:
    """When the newest whole checkpoint was finished, seconds since the epoch."""
    times = [
        marker.stat().st_mtime
        for marker in run.checkpoints(cast("Trained", stage)).glob("checkpoint-*/complete.json")
    ]
    return max(times, default=None)


def _newest_checkpoint(directory: Path) -> tuple[int, int]:
    """Its step and the number of steps; zeros if there is none."""
    found = []
    for marker in directory.glob("checkpoint-*/complete.json"):
        # It may be removed under our eyes.
        with suppress(FileNotFoundError, DataError):
            facts = read_json(marker)
            found.append((int(facts["step"]), int(facts["plan"]["max_steps"])))
    return max(found, default=(0, 0))


def _last_logged_step(metrics: Path) -> int:
    for line in reversed(_tail(metrics)):
        with suppress(ValueError, KeyError, TypeError):
            return int(json.loads(line)["step"])
    return 0


def _progress_lines(log: Path, stage: str) -> list[_Said]:
    """What the log's end says of this training, from the last time that it began."""
    found: list[_Said] = []
    for line in _tail(log):
        if f" stage={stage} " in line and " event=stage_start " in line:
            found = []
        if " event=progress " not in line or f" task={stage} " not in line:
            continue
        with suppress(ValueError, KeyError):
            fields = dict(part.split("=", 1) for part in shlex.split(line) if "=" in part)
            at = datetime.fromisoformat(fields["time"].replace("Z", "+00:00")).timestamp()
            found.append(_Said(at, int(fields["done"]), int(fields["total"])))
    return found


def _rate(said: list[_Said]) -> float | None:
    """Steps a second over the last few lines, if they are of now."""
    recent = said[-10:]
    if len(recent) < 2 or time.time() - recent[-1].at > _FRESH_S:
        return None
    seconds, steps = recent[-1].at - recent[0].at, recent[-1].step - recent[0].step
    return steps / seconds if seconds > 0 and steps > 0 else None


def _tail(path: Path) -> list[str]:
    """The last whole lines of a file that may be growing, or not be there."""
    try:
        with path.open("rb") as handle:
            size = handle.seek(0, 2)
            handle.seek(max(0, size - _TAIL_BYTES))
            lines = handle.read().decode("utf-8", "replace").split("\n")
    except FileNotFoundError:
        return []
    return lines[(1 if size > _TAIL_BYTES else 0) : -1]
