"""What Slurm says about jobs, read from the text of squeue and sacct.

a line of squeue → TaskState: a plain job, one task of an array, or the tasks of an array that still
wait, which Slurm folds into one line (`123_[5-99,200%10]`)
a line of sacct -D → Incarnation: one time that a job or task ran; a requeued one ran several times
a reason → what it means for a person, and whether waiting will mend it
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple, TypeVar

QUEUE_FIELDS = (
    "JobArrayID", "JobID", "State", "Reason", "TimeUsed", "TimeLeft", "NodeList", "StartTime",
    "RestartCnt", "exit_code", "Comment",
)  # fmt: skip
"""What squeue is asked for. Width 0 prints a field in full, and what follows it is a separator."""
QUEUE_FORMAT = ",".join(f"{field}:0|" for field in QUEUE_FIELDS)
HISTORY_FORMAT = "JobID,JobIDRaw,State,ExitCode,Start,End,ElapsedRaw,NodeList"

_ENDED = frozenset({
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
    "PREEMPTED", "REVOKED", "TIMEOUT",
})  # fmt: skip
_HOLDS_NODES = frozenset({
    "COMPLETING", "CONFIGURING", "RESIZING", "RUNNING", "SIGNALING", "STAGE_OUT", "STOPPED",
    "SUSPENDED",
})  # fmt: skip
_JOB = re.compile(r"^(?P<id>\d+)(?:_(?:\[(?P<many>[^\]]*)\]?|(?P<one>\d+)))?$")


_Line = TypeVar("_Line")


@dataclass(frozen=True, slots=True)
class TaskState:
    """One line of the queue."""

    job_id: str
    """The id that sbatch printed; of an array, the array's."""
    indices: tuple[int, ...]
    """The array tasks that the line is about; empty for a plain job."""
    raw_id: str
    """SLURM_JOB_ID within it: of array tasks another than `job_id`, but for the last one."""
    state: str
    """Slurm's word, such as PENDING, RUNNING or TIMEOUT."""
    reason: str = ""
    """Slurm's word for why it waits or how it ended; empty where it gives none."""
    elapsed_s: int = 0
    left_s: int | None = None
    """Seconds to the time limit; None where there is none."""
    nodes: str = ""
    """Names, in Slurm's short form."""
    starts_at: float | None = None
    """When it began or is expected to begin, seconds since the epoch."""
    restarts: int = 0
    """How often it was requeued."""
    exit_code: int = 0
    """Of a task that has ended; 128 + the signal if one killed it."""
    comment: str = ""

    @property
    def index(self) -> int | None:
        """The array task, where the line is about exactly one."""
        return self.indices[0] if len(self.indices) == 1 else None

    @property
    def count(self) -> int:
        """Jobs or tasks that the line stands for."""
        return max(1, len(self.indices))

    @property
    def ended(self) -> bool:
        """Whether it is over: Slurm remembers ended jobs for a few minutes."""
        return self.state in _ENDED

    @property
    def runs(self) -> bool:
        """Whether it has nodes."""
        return self.state in _HOLDS_NODES

    @property
    def waits(self) -> bool:
        """Whether it has yet to begin, or to begin again."""
        return not self.ended and not self.runs


@dataclass(frozen=True, slots=True)
class Incarnation:
    """One time that a job or an array task ran, or is running."""

    job_id: str
    index: int | None
    raw_id: str
    """SLURM_JOB_ID within it."""
    state: str
    """As in TaskState; REQUEUED or PREEMPTED for one that a later incarnation followed."""
    exit_code: int
    started_at: float
    """Seconds since the epoch."""
    ended_at: float | None
    """None while it runs."""
    elapsed_s: int
    nodes: str = ""

    @property
    def ended(self) -> bool:
        """Whether it is over."""
        return self.ended_at is not None


def parse_queue(text: str) -> list[TaskState]:
    """The lines of squeue with QUEUE_FORMAT; lines of another form are left out."""
    return _each_line(text, _task_state)


def parse_history(text: str) -> list[Incarnation]:
    """The lines of sacct with HISTORY_FORMAT that have begun."""
    return _each_line(text, _incarnation)


def _each_line(text: str, read: Callable[[list[str]], _Line | None]) -> list[_Line]:
    found = (read([field.strip() for field in line.split("|")]) for line in text.splitlines())
    return [entry for entry in found if entry is not None]


def _task_state(fields: list[str]) -> TaskState | None:
    job = _JOB.match(fields[0])
    if job is None or len(fields) < len(QUEUE_FIELDS):
        return None
    _, raw_id, state, reason, used, left, nodes, start, restarts, status, comment = fields[:11]
    return TaskState(
        job_id=job["id"],
        indices=_indices(job),
        raw_id=raw_id,
        state=state,
        reason="" if reason in ("None", "(null)") else reason,
        elapsed_s=_seconds(used) or 0,
        left_s=_seconds(left),
        nodes=nodes,
        starts_at=_epoch(start),
        restarts=int(restarts) if restarts.isdigit() else 0,
        exit_code=_from_wait_status(int(status)) if status.isdigit() else 0,
        comment="" if comment == "(null)" else comment,
    )


def _incarnation(fields: list[str]) -> Incarnation | None:
    job = _JOB.match(fields[0])
    if job is None or len(fields) < len(HISTORY_FORMAT.split(",")):
        return None
    _, raw_id, state, exit_code, start, end, elapsed, nodes = fields[:8]
    started = _epoch(start)
    if started is None or job["many"] is not None:
        return None
    code, _, signal = exit_code.partition(":")
    return Incarnation(
        job_id=job["id"],
        index=int(job["one"]) if job["one"] else None,
        raw_id=raw_id,
        state=state.split()[0],  # `CANCELLED by 1000`
        exit_code=128 + int(signal) if signal not in ("", "0") else int(code or 0),
        started_at=started,
        ended_at=_epoch(end),
        elapsed_s=int(elapsed) if elapsed.isdigit() else 0,
        nodes="" if nodes == "None assigned" else nodes,
    )


def _indices(job: re.Match[str]) -> tuple[int, ...]:
    if job["one"] is not None:
        return (int(job["one"]),)
    return expand_indices(job["many"]) if job["many"] is not None else ()


def expand_indices(expression: str) -> tuple[int, ...]:
    """The numbers of `5-99,200%10` or `0-20:2`."""
    found: list[int] = []
    for part in expression.partition("%")[0].split(","):
        span, _, step = part.partition(":")
        first, _, last = span.partition("-")
        # `...` stands where a Slurm that was told otherwise cut the list short.
        if first.isdigit() and (last or first).isdigit():
            found += range(int(first), int(last or first) + 1, int(step or 1))
    return tuple(found)


def _seconds(text: str) -> int | None:
    """`1-02:03:04`, `02:03:04` or `03:04` in seconds; None for UNLIMITED, INVALID and the like."""
    days, _, clock = text.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in (*parts, days or "0")):
        return None
    total = 0
    for part in parts:
        total = total * 60 + int(part)
    return int(days or 0) * 86_400 + total


def _epoch(text: str) -> float | None:
    try:
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S").astimezone().timestamp()
    except ValueError:
        return None


def _from_wait_status(status: int) -> int:
    signal = status & 0x7F
    return 128 + signal if signal else status >> 8


class Explanation(NamedTuple):
    """A reason in plain words."""

    sentence: str
    needs_person: bool = False
    """Whether it stays so until somebody does something."""


def explain(reason: str) -> Explanation:
    """What Slurm's word for a pending job's reason means."""
    word = reason.partition(",")[0].strip().strip("()").replace(" ", "_")
    for pattern, explanation in _REASONS:
        if re.match(pattern, word, re.IGNORECASE):
            return explanation
    return Explanation(f"Slurm says {reason}")


_REASONS: tuple[tuple[str, Explanation], ...] = (
    (r"^$|None$", Explanation("about to be looked at by Slurm")),
    (r"Priority$", Explanation("other jobs come first")),
    (r"Resources$", Explanation("next in line, until enough nodes are free")),
    (r"DependencyNeverSatisfied", Explanation("the job it waits for failed: never starts", True)),
    (r"Dependency", Explanation("waits for an earlier job")),
    (r"JobArrayTaskLimit", Explanation("as many tasks run as cluster.parallelism allows")),
    (r"BeginTime", Explanation("was requeued a moment ago, or has a set begin time")),
    (r"JobHeldUser", Explanation("held by its owner: scontrol release", True)),
    (r"JobHeldAdmin", Explanation("held by an administrator", True)),
    (r"(launch_failed|job).*requeued.*held|JobHoldMaxRequeue",
     Explanation("could not be started and is held: scontrol release", True)),
    (r"PartitionTimeLimit|QOSMaxWallDuration|AssocMaxWallDuration",
     Explanation("asks for more time than it may have: lower cluster.time_min", True)),
    (r"PartitionNodeLimit", Explanation("asks for more nodes than its partition has", True)),
    (r"PartitionDown|PartitionInactive", Explanation("its partition is closed for now")),
    (r"ReqNodeNotAvail", Explanation("nodes it needs are down, drained or reserved")),
    (r"NodeDown", Explanation("a node it needs is down")),
    (r"BadConstraints", Explanation("no node has what it asks for: cluster.constraint", True)),
    (r"Reservation", Explanation("waits for its reservation")),
    (r"Licenses", Explanation("waits for a licence")),
    (r"InvalidAccount|AccountNotAllowed",
     Explanation("its account is not allowed there: cluster.account", True)),
    (r"InvalidQOS|QOSNotAllowed", Explanation("its QOS is not allowed there: cluster.qos", True)),
    (r"(Assoc|QOS).*(Minutes|RunMinutes)", Explanation("the account's budget is used up", True)),
    (r"(Assoc|QOS).*PerJob|QOSMin", Explanation("one job asks for more than is allowed", True)),
    (r"QOS|MaxJobsPer|MaxSubmit", Explanation("your jobs use all that their QOS allows at a time")),
    (r"Assoc", Explanation("your account's jobs use all that it may have at a time")),
    (r"Cleaning", Explanation("its last run is being cleaned up")),
)  # fmt: skip
