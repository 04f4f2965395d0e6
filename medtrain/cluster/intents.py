"""What became of intents: jobs that may exist although their ids were never written down.

A submitter can die, or lose its connection, between publishing an intent and writing down the job
ids. The intent's nonce stands in the job's comment: a job that is found by it is adopted where it
is whole, and cancelled otherwise. Jobs that come to light later, because their sbatch outlived its
submitter, are cancelled as well.
"""

from __future__ import annotations

import os
import socket
import time
from datetime import datetime

from medtrain.cluster.ledger import COMMENT_PREFIX, Ledger, Submission
from medtrain.cluster.slurm import Slurm
from medtrain.errors import TryAgainError
from medtrain.run import Run

ELSEWHERE_S = 120.0
"""An intent of another machine without a note of job ids is a dead submitter's after this long."""
IN_FLIGHT_S = 10.0
"""How long an sbatch may outlive the submitter that called it."""


def settle(run: Run, slurm: Slurm, intent: Submission) -> Submission:
    """Adopt or cancel the job of an intent without a note, and write the note.

    Raises:
        TryAgainError: its submitter, on another machine, may be at work.
        SlurmUnreachableError: Slurm does not answer; the intent stays open.
    """
    ledger = Ledger(run)
    found = _wait_for_jobs(slurm, intent)
    if len(found) == 1 and _is_whole(run, intent, found[0]):
        return ledger.note(intent, found, [0])
    slurm.cancel(found)
    return ledger.give_up(intent)


def settle_all(run: Run, slurm: Slurm) -> None:
    """Settle every open intent of a run, and cancel jobs of it that the ledger does not know.

    Raises:
        TryAgainError: a submitter on another machine may be at work.
        SlurmUnreachableError: Slurm does not answer.
    """
    ledger = Ledger(run)
    for intent in (s for s in ledger.all() if not ledger.was_noted(s)):
        settle(run, slurm, intent)
    known = {s.comment: s.job_ids for s in ledger.all()}
    lost = [
        task.job_id
        for task in slurm.queue_by_comment(COMMENT_PREFIX)
        if not task.ended and task.job_id not in known.get(task.comment, (task.job_id,))
    ]
    slurm.cancel(lost)


def _wait_for_jobs(slurm: Slurm, intent: Submission) -> list[str]:
    """The jobs of an intent. Of a submitter that has just died, the sbatch may be at work still."""
    host, _, pid = intent.made_by.partition(":")
    age_s = time.time() - datetime.fromisoformat(intent.made_at).timestamp()
    if host != socket.gethostname() and age_s < ELSEWHERE_S:
        raise TryAgainError(
            f"{intent.key} is being submitted by {intent.made_by}", fix="Try again in two minutes."
        )
    own = host == socket.gethostname() and pid == str(os.getpid())
    deadline = time.monotonic() + (2.0 if own else max(0.0, IN_FLIGHT_S - age_s))
    while True:
        tasks = slurm.queue_by_comment(intent.comment)
        found = sorted({task.job_id for task in tasks if not task.ended})
        if found or time.monotonic() >= deadline:
            return found
        time.sleep(0.5)


def _is_whole(run: Run, intent: Submission, job_id: str) -> bool:
    """Whether every task of a job finds its arguments."""
    if intent.steps[0][0] == "train":
        return True
    folder = run.job_folder(intent.key, intent.number)
    count = len(intent.tasks)
    names = [f"{job_id}_{i}" for i in range(count)] if count > 1 else [job_id]
    return all((folder / f"{name}_submitted.pkl").exists() for name in names)
