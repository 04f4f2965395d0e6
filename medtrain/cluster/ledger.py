"""The ledger: what a run has handed to Slurm, in files.

intent `submissions/<key>.<number>.json` (published, first writer wins) → sbatch → note of the job
ids `submissions/<key>.<number>.job.json`. Whoever dies between the two leaves an intent whose nonce
is in the job's comment, so that the job can be found and adopted. Nothing here is ever changed;
what became of a job is asked of Slurm and of the files the job wrote.
"""

from __future__ import annotations

import os
import re
import socket
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from medtrain.errors import DataError
from medtrain.files import publish, read_sealed, sealed
from medtrain.run import Run
from medtrain.shards import Unit

Step = tuple[str, str, str]
"""What is done, to which stage, to which phase of it: `("open", "generate", "candidates")`."""
Condition = Literal["afterok", "afterany"]
COMMENT_PREFIX = "medtrain:"
_INTENT = re.compile(r"^(?P<key>[a-z][a-z.-]*)\.(?P<number>\d{3,})\.json$")


class Repair(NamedTuple):
    """A round in which missing shards are computed; 0 is the chain's own array."""

    round: int = 0
    in_vain: int = 0
    """Rounds up to this one before which no row had been finished since the one before."""
    rows: int = 0
    """Finished rows of the phase when it was submitted."""


NO_REPAIR = Repair()


@dataclass(frozen=True, slots=True)
class Submission:
    """One job or array that was, or is about to be, submitted."""

    key: str
    """Which job of the chain: `prepare`, `sft`, `generate.candidates`, …"""
    number: int
    """How many of this key were submitted before it."""
    nonce: str
    """Unique; the job's comment is `medtrain:<nonce>`."""
    steps: tuple[Step, ...]
    """What it does, in order."""
    after: tuple[tuple[str, Condition], ...] = ()
    """Keys of the jobs it waits for, and how each has to end. A repair submits a key again: the
    newest submission of it is meant."""
    tasks: tuple[tuple[Unit, ...], ...] = ()
    """Of an array: what each task does. Empty for a plain job."""
    gpus: int = 0
    """GPUs of one task (of all nodes together, in training)."""
    chain: str = ""
    """Names the chain it is a part of: what is queued while a part of it lives belongs to it."""
    repair: Repair = NO_REPAIR
    """Which round of repair it belongs to."""
    made_by: str = ""
    """host:pid of the submitter."""
    made_at: str = ""
    """ISO time."""
    job_ids: tuple[str, ...] = ()
    """Slurm's ids, several where an array was split; empty until they are known."""
    starts: tuple[int, ...] = ()
    """For each id: the first entry of `tasks` that it holds."""

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages it works on, in order."""
        return tuple(dict.fromkeys(stage for _, stage, _ in self.steps))

    @property
    def is_array(self) -> bool:
        """Whether it consists of shard tasks."""
        return bool(self.tasks)

    @property
    def comment(self) -> str:
        """What `--comment` says."""
        return f"{COMMENT_PREFIX}{self.nonce}"

    def task_of(self, job_id: str, index: int) -> int | None:
        """Which entry of `tasks` an array element is; None if it is not of this submission."""
        for own, start in zip(self.job_ids, self.starts, strict=True):
            if own == job_id and start + index < len(self.tasks):
                return start + index
        return None


class Ledger:
    """The submissions of one run."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def all(self) -> list[Submission]:
        """Every submission, oldest first."""
        if not self.run.submissions.is_dir():
            return []
        found = [
            self._read(path)
            for path in self.run.submissions.iterdir()
            if _INTENT.match(path.name) and not path.name.endswith(".job.json")
        ]
        return sorted(found, key=lambda s: (s.made_at, s.key, s.number))

    def latest(self) -> dict[str, Submission]:
        """The newest submission of every key."""
        return {s.key: s for s in sorted(self.all(), key=lambda s: s.number)}

    def one(self, key: str, number: int) -> Submission:
        """The submission of that key and number."""
        return self._read(self._intent(key, number))

    def intend(
        self,
        key: str,
        *,
        steps: Sequence[Step],
        after: Iterable[tuple[str, Condition]] = (),
        tasks: Iterable[Iterable[Unit]] = (),
        gpus: int = 0,
        chain: str = "",
        repair: Repair = NO_REPAIR,
        number: int | None = None,
    ) -> Submission | None:
        """Publish an intent; None if somebody else has published one of this key and number.

        Without a number it is the next one. Who decided by what the ledger held some time ago gives
        the number that was next then, so that of two who decide at once only one submits.
        """
        number = self.next_numbers()[key] if number is None else number
        submission = Submission(
            key=key,
            number=number,
            nonce=uuid.uuid4().hex[:16],
            steps=tuple(steps),
            after=tuple(after),
            tasks=tuple(tuple(units) for units in tasks),
            gpus=gpus,
            chain=chain,
            repair=repair,
            made_by=f"{socket.gethostname()}:{os.getpid()}",
            made_at=datetime.now(UTC).isoformat(timespec="microseconds"),
        )
        self.run.submissions.mkdir(exist_ok=True)
        won = publish(self._intent(key, number), sealed(_to_json(submission)))
        return submission if won else None

    def next_numbers(self) -> Counter[str]:
        """Of every key, the number that its next submission has."""
        return Counter(submission.key for submission in self.all())

    def note(
        self, submission: Submission, job_ids: Sequence[str], starts: Sequence[int]
    ) -> Submission:
        """Write down the job ids of an intent; what was noted first stands."""
        noted = {"nonce": submission.nonce, "job_ids": list(job_ids), "starts": list(starts)}
        publish(self._note(submission.key, submission.number), sealed(noted))
        return self._read(self._intent(submission.key, submission.number))

    def give_up(self, submission: Submission) -> Submission:
        """Note that an intent came to nothing: no job of it exists, or it was cancelled."""
        return self.note(submission, (), ())

    def was_noted(self, submission: Submission) -> bool:
        """Whether its job ids are known, or that there are none."""
        return self._note(submission.key, submission.number).exists()

    def _intent(self, key: str, number: int) -> Path:
        return self.run.submissions / f"{key}.{number:03d}.json"

    def _note(self, key: str, number: int) -> Path:
        return self.run.submissions / f"{key}.{number:03d}.job.json"

    def _read(self, intent: Path) -> Submission:
        submission = _from_json(read_sealed(intent))
        try:
            noted = read_sealed(self._note(submission.key, submission.number))
        except FileNotFoundError:
            return submission
        if noted["nonce"] != submission.nonce:
            raise DataError(f"{intent} and its note of job ids do not belong together")
        return replace(submission, job_ids=tuple(noted["job_ids"]), starts=tuple(noted["starts"]))


def _to_json(submission: Submission) -> dict[str, Any]:
    fields = {f: getattr(submission, f) for f in Submission.__slots__}
    del fields["job_ids"], fields["starts"]
    # One spelling for every sequence: JSON knows lists only, and the seal is over what is read.
    return {key: _listed(value) for key, value in fields.items()}


def _listed(value: Any) -> Any:
    return [_listed(entry) for entry in value] if isinstance(value, (tuple, list)) else value


def _from_json(tree: dict[str, Any]) -> Submission:
    """Fields that another version wrote and this one lacks are left out, and the other way round:
    jobs that are queued run the code that is installed when they begin."""
    read: dict[str, Callable[[Any], Any]] = {
        "steps": lambda steps: tuple((verb, stage, phase) for verb, stage, phase in steps),
        "repair": lambda repair: Repair(*repair),
        "after": lambda after: tuple((key, condition) for key, condition in after),
        "tasks": lambda tasks: tuple(tuple((k, shard) for k, shard in task) for task in tasks),
    }
    known = {f: tree[f] for f in Submission.__slots__ if f in tree}
    return Submission(**{f: read[f](v) if f in read else v for f, v in known.items()})
