"""One try at one shard: resume from what earlier tries finished, compute the rest, publish.

attempt.json and heartbeat → what earlier attempts finished, and what killed them → batches still to
do, then suspect rows one by one → own journal → rows.jsonl in plan order → done.json, by the first
attempt that gets there. However the attempt ends, it says so, unless its process is killed.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from medtrain.errors import MedtrainError
from medtrain.files import atomic_writer, json_line
from medtrain.shards.history import Result, finished, finished_rows, forgive, look_back
from medtrain.shards.journal import Journal
from medtrain.shards.liveness import AttemptMark, Beat, Heartbeat
from medtrain.shards.plan import Plan
from medtrain.shards.quarantine import is_final, quarantined, suspicion
from medtrain.shards.receipts import distrust, publish_receipt, receipt_that_holds, sound_receipt
from medtrain.shards.shard_files import ShardFiles

__all__ = [
    "Result",
    "ShardFiles",
    "Work",
    "distrust",
    "finished_rows",
    "forgive",
    "receipt_that_holds",
    "run_attempt",
    "sound_receipt",
]

Work = Callable[[Iterable[list[str]]], Iterator[tuple[str, Result]]]
"""Batches of row ids that still have rows to do, pulled one after the other → (row id, result) as
rows finish. What has been pulled and not been yielded is in flight."""


def run_attempt(
    plan: Plan, shard: int, files: ShardFiles, work: Work, on_row: Callable[[Result], None]
) -> None:
    """Finish one shard; returns at once where its receipt stands and is sound.

    Rows with an error are kept in the receipt as errors, but are tried again by a later attempt of
    the same shard only if no receipt was published. Rows that killed their processes are given up
    on (see `medtrain.shards.quarantine`) and are errors too.

    Raises:
        MedtrainError: `work` ended without having finished its rows.
    """
    if sound_receipt(plan, shard, files) is not None:
        return
    mark = AttemptMark.mine(plan.plan_id, plan.batch_size)
    own = files.attempt(mark.attempt)
    with Heartbeat(own, mark, shard) as heartbeat, Journal(own.journal) as journal:
        attempt = _Attempt(plan, files, mark, heartbeat.beat, journal, on_row)
        alone = attempt.resume()
        attempt.compute(work, alone)
        attempt.publish()


class _Attempt:
    """The rows of a try, finished and to do."""

    def __init__(
        self,
        plan: Plan,
        files: ShardFiles,
        mark: AttemptMark,
        beat: Beat,
        journal: Journal,
        on_row: Callable[[Result], None],
    ) -> None:
        self._plan, self._files, self._mark = plan, files, mark
        self._beat, self._journal, self._on_row = beat, journal, on_row
        self._hashes = plan.hashes(files.shard)
        self._finished: dict[str, Result] = {}
        self._computed: list[str] = []
        self._attempts = 1
        self._load_seconds = self._seconds = 0.0

    def resume(self) -> frozenset[str]:
        """Take over what is finished, give up on rows that killed; returns what goes alone."""
        past = look_back(self._files, self._hashes, me=self._mark)
        self._attempts += len(past)
        for row, result in finished(past).items():
            if is_final(result):
                self._take(row, result)
        doubts = suspicion(past)
        for row, deaths in doubts.given_up.items():
            self._finish(row, quarantined(deaths))
        return doubts.alone

    def compute(self, work: Work, alone: frozenset[str]) -> None:
        """Batches first, then suspects one by one: nothing else is in flight beside one of them."""
        batches, suspects = self._to_do(alone)
        if batches:
            self._run(work, batches)
        for row in suspects:
            self._run(work, [[row]], alone=True)
        missing = [row for row in self._hashes if row not in self._finished]
        if missing:
            raise MedtrainError(f"Shard {self._files.shard} ended with {len(missing)} rows undone")

    def _to_do(self, alone: frozenset[str]) -> tuple[list[list[str]], list[str]]:
        """Batches with rows to do, as whole as they were planned, and rows to do one by one."""
        ids = list(self._hashes)
        batches: list[list[str]] = []
        suspects: list[str] = []
        for start in range(0, len(ids), self._plan.batch_size):
            batch = ids[start : start + self._plan.batch_size]
            undone = [row for row in batch if row not in self._finished]
            if not alone.isdisjoint(undone):
                suspects += undone
            elif undone:
                given_up = {r for r in batch if self._finished.get(r, {}).get("quarantined")}
                batches.append([row for row in batch if row not in given_up])
        return batches, suspects

    def _run(self, work: Work, batches: Sequence[list[str]], *, alone: bool = False) -> None:
        called = pulled = time.monotonic()

        def pull() -> Iterator[list[str]]:
            nonlocal pulled
            for number, batch in enumerate(batches):
                if number == 0:
                    pulled = time.monotonic()
                    self._beat.working_since = self._beat.working_since or time.time()
                self._journal.pulled(batch, alone=alone)
                yield batch

        for row, result in work(pull()):
            self._computed.append(row)
            if row not in self._finished:
                self._finish(row, result)
        self._load_seconds += pulled - called
        self._seconds += time.monotonic() - pulled

    def _finish(self, row: str, result: Result) -> None:
        self._journal.append({"id": row, "request": self._hashes[row], "result": result})
        self._beat.new += 1
        self._beat.last_row_at = time.time()
        self._take(row, result)

    def _take(self, row: str, result: Result) -> None:
        self._finished[row] = result
        self._beat.rows += 1
        self._beat.errors += "error" in result
        self._on_row(result)

    def publish(self) -> None:
        """Write the rows in plan order, and their receipt."""
        shard, results = self._files.shard, [self._finished[row] for row in self._hashes]
        rows = self._files.attempt(self._mark.attempt).rows
        # Not of the file as it is read back: that may be damaged already.
        sha256, size = hashlib.sha256(), 0
        with atomic_writer(rows) as handle:
            for row, result in zip(self._hashes, results, strict=True):
                line = json_line({"id": row, **result})
                sha256.update(line)
                size += len(line)
                handle.write(line)
        receipt = {
            "plan_id": self._plan.plan_id,
            "shard": shard,
            "attempt": self._mark.attempt,
            "attempts": self._attempts,
            "rows": len(results),
            "row_ids_digest": self._plan.digests[shard],
            "bytes": size,
            "sha256": sha256.hexdigest(),
            "errors": sum("error" in result for result in results),
            "quarantined": sum(bool(result.get("quarantined")) for result in results),
            "tokens": sum(int(result.get("tokens", 0)) for result in results),
            "seconds": round(self._seconds, 6),
            "load_seconds": round(self._load_seconds, 6),
            "computed": self._sums(),
            "gpus": self._mark.gpus,
            "started_at": self._mark.started_at,
            "ended_at": time.time(),
        }
        publish_receipt(self._plan, self._files, receipt)

    def _sums(self) -> dict[str, int]:
        """What `seconds` were spent on: from these, estimates are fitted."""
        requests = {request.id: request for request in self._plan.rows(self._files.shard)}
        rows = [row for row in self._computed if "error" not in self._finished[row]]
        return {
            "rows": len(rows),
            "tokens": sum(int(self._finished[row].get("tokens", 0)) for row in rows),
            "prompt_tokens": sum(requests[row].prompt_tokens for row in rows),
            "max_answer_tokens": sum(requests[row].max_answer_tokens for row in rows),
        }
