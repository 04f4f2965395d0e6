"""The facts about a stage that status and watch show: plain values, as JSON too."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from medtrain.shards.progress import OpenAttempt

State = Literal[
    "done", "running", "queued", "begun", "stopped", "failed", "stale", "waits", "missing"
]  # fmt: skip
"""`begun`: not finished, and nobody here knows whether somebody works on it. `stopped`: the same,
and nobody does. `stale`: finished, and something it
depends on was changed. `waits`: finished, but an earlier stage is not. `missing`: not begun."""


@dataclass(frozen=True, slots=True)
class Amount:
    """How much of something is done."""

    done: int
    total: int
    unit: Literal["rows", "steps"] = "rows"
    per_s: float | None = None
    """How fast it goes; None if nothing moves or nobody knows."""

    @property
    def eta_s(self) -> float | None:
        """Seconds until it is done."""
        return (self.total - self.done) / self.per_s if self.per_s else None


@dataclass(frozen=True, slots=True)
class Shards:
    """What became of the shards of a stage."""

    total: int
    done: int
    running: int = 0
    waiting: int = 0
    """In Slurm's queue."""
    failed: int = 0
    """Tried, not done, and neither running nor waiting to be."""


@dataclass(frozen=True, slots=True)
class GpuTime:
    """Seconds of GPUs."""

    spent_s: float = 0.0
    wasted_s: float = 0.0
    """Of those: after the last row or checkpoint that was kept, in tries that did not end well."""

    def __add__(self, other: GpuTime) -> GpuTime:
        return GpuTime(self.spent_s + other.spent_s, self.wasted_s + other.wasted_s)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a stage's last try ended."""

    message: str
    fix: str = ""
    exit_code: int = 70


@dataclass(frozen=True, slots=True)
class Jobs:
    """What Slurm says of a stage's jobs."""

    ids: tuple[str, ...]
    running: int = 0
    """Jobs or array tasks that have nodes."""
    waiting: int = 0
    failed: int = 0
    """Tasks that ended otherwise than well, and were not followed by one that did."""
    reason: str = ""
    """Why the first of those that wait does so, in Slurm's word."""
    sentence: str = ""
    """The same in plain words."""
    needs_person: bool = False
    """Whether that mends itself."""
    starts_at: float | None = None
    """When the first of those that wait is expected to begin, seconds since the epoch."""
    elapsed_s: int = 0
    """Of the one that has been running longest."""
    requeues: int = 0
    repair_round: int = 0
    """How often missing shards were submitted again."""
    ended: str = ""
    """How the last job ended, if not well, such as `job 12 ended: TIMEOUT`."""


@dataclass(frozen=True, slots=True)
class StageStatus:
    """One stage's line."""

    name: str
    state: State
    note: str = ""
    """Counts of a finished stage; what changed, what failed or how far it is otherwise."""
    seconds: float | None = None
    """How long a finished stage took."""
    counts: dict[str, Any] = field(default_factory=dict)
    amount: Amount | None = None
    """How far an unfinished stage is."""
    parts: tuple[tuple[str, Amount], ...] = ()
    """The same of its parts, where it has several."""
    shards: Shards | None = None
    errors: int = 0
    """Rows that have an error instead of a result."""
    quarantined: int = 0
    """Rows that were given up because they ended their process twice."""
    attempts: tuple[OpenAttempt, ...] = ()
    """At shards that are not done: those that go on, and those that died."""
    silent: int = 0
    """Tasks that Slurm takes for running and that have shown no sign of life for too long."""
    strays: int = 0
    """Attempts that go on though Slurm knows no such job any more."""
    failure: Failure | None = None
    jobs: Jobs | None = None
    gpu: GpuTime | None = None

    def to_json(self) -> dict[str, Any]:
        """As a JSON object; what is not known is null."""
        amount = self.amount
        return {
            "name": self.name,
            "state": self.state,
            "note": self.note,
            "seconds": self.seconds,
            "counts": self.counts,
            "progress": _amount_json(amount) if amount else None,
            "parts": {name: _amount_json(part) for name, part in self.parts},
            "shards": asdict(self.shards) if self.shards else None,
            "errors": self.errors,
            "quarantined": self.quarantined,
            "silent": self.silent,
            "strays": self.strays,
            "failure": asdict(self.failure) if self.failure else None,
            "jobs": asdict(self.jobs) if self.jobs else None,
            "gpu_hours": gpu_json(self.gpu) if self.gpu else None,
        }


def _amount_json(amount: Amount) -> dict[str, Any]:
    return {**asdict(amount), "eta_s": amount.eta_s}


def gpu_json(gpu: GpuTime) -> dict[str, float]:
    """In hours."""
    return {"spent": round(gpu.spent_s / 3600, 4), "wasted": round(gpu.wasted_s / 3600, 4)}
