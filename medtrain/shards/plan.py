"""The plan of a sharded stage: which rows there are, and which batches and shards they form.

requests, longest first → batches of neighbours → shards of about equal cost. The plan's id covers
what changes a row's result and nothing else, so a plan may be laid out anew (other batch size,
other number of shards) without losing finished rows. On disk stands the layout alone: positions and
a digest of each shard's row ids, small and quick to read for millions of rows. Whoever computes
makes the plan from its own requests and binds it to that layout.
"""

from __future__ import annotations

import base64
import heapq
import sys
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from medtrain.errors import DataError
from medtrain.files import digest_of, read_sealed

PLAN_VERSION = 2
"""Of the file."""
_ID_VERSION = 1
"""Of the way in which plan ids and request hashes are made."""


@dataclass(frozen=True, slots=True)
class Request:
    """One row of work."""

    id: str
    """Unique in its stage."""
    payload: Mapping[str, Any]
    """Everything of this row that changes its result, as JSON values."""
    cost: float = 1.0
    """Estimated work, in any unit (tokens are a good one). Rows of similar cost share a batch."""
    prompt_tokens: int = 0
    """What the estimate of seconds is made from; changes no result."""
    max_answer_tokens: int = 0
    """Budget of all its answers together; changes no result."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What is computed together with what: all that a plan on disk says."""

    plan_id: str
    """Hash of the settings and of every row's id and request hash."""
    batch_size: int
    """Rows of every batch but the last one of one shard, which may be shorter."""
    shards: tuple[array[int], ...]
    """Of each shard the positions of its rows, in the order of its result file, batch by batch."""
    digests: tuple[str, ...]
    """Of each shard's row ids, in the same order."""

    @property
    def num_rows(self) -> int:
        """Rows of all shards."""
        return sum(map(len, self.shards))

    def positions(self, shard: int) -> array[int]:
        """The positions of a shard's rows, in the order of its result file."""
        return self.shards[shard]

    def batches(self, shard: int) -> list[tuple[int, ...]]:
        """The positions of a shard's rows, batch by batch."""
        rows = self.shards[shard]
        return [tuple(rows[i : i + self.batch_size]) for i in range(0, len(rows), self.batch_size)]

    def same_layout(self, other: Layout) -> bool:
        """Whether both cut the same rows into the same batches and shards."""
        return all(getattr(self, f.name) == getattr(other, f.name) for f in fields(Layout))

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "version": PLAN_VERSION,
            "plan_id": self.plan_id,
            "batch_size": self.batch_size,
            "rows": self.num_rows,
            "shards": [
                {"rows": len(rows), "positions": _packed(rows), "row_ids_digest": digest}
                for rows, digest in zip(self.shards, self.digests, strict=True)
            ],
        }

    @classmethod
    def read(cls, path: Path) -> Layout:
        """The layout in a plan file.

        Raises:
            DataError: it is no plan of this version, or was changed.
        """
        tree = read_sealed(path)
        if tree.get("version") != PLAN_VERSION:
            raise DataError(f"{path} is no plan of this version of medtrain", fix="Delete it.")
        return Layout(
            plan_id=tree["plan_id"],
            batch_size=tree["batch_size"],
            shards=tuple(_unpacked(shard["positions"]) for shard in tree["shards"]),
            digests=tuple(shard["row_ids_digest"] for shard in tree["shards"]),
        )


@dataclass(frozen=True, slots=True)
class Plan(Layout):
    """A layout together with the rows it was made from: what an attempt works by."""

    requests: tuple[Request, ...]
    """In the order of the collected file."""
    row_hashes: tuple[str, ...]
    """Request hash of each row: its result depends on nothing else."""

    def rows(self, shard: int) -> list[Request]:
        """A shard's requests in the order of its result file."""
        return [self.requests[position] for position in self.shards[shard]]

    def hashes(self, shard: int) -> dict[str, str]:
        """Row id → request hash of a shard's rows, in the order of its result file."""
        return {self.requests[i].id: self.row_hashes[i] for i in self.shards[shard]}

    def bound_to(self, layout: Layout) -> Plan:
        """The same rows, laid out as a plan on disk says.

        Raises:
            DataError: that plan is of other rows or other settings.
        """
        if layout.plan_id != self.plan_id:
            raise DataError(
                "The plan on disk was made from other rows or settings than this process has",
                fix="Something that an earlier stage wrote, or the configuration, has changed "
                "since: run or submit the stage again.",
            )
        return Plan(
            plan_id=self.plan_id,
            batch_size=layout.batch_size,
            shards=layout.shards,
            digests=layout.digests,
            requests=self.requests,
            row_hashes=self.row_hashes,
        )


def make_plan(
    requests: Sequence[Request],
    settings: Mapping[str, Any],
    *,
    batch_size: int = 1,
    num_shards: int = 1,
    weights: Sequence[float] | None = None,
) -> Plan:
    """Cut requests into batches and shards.

    Batches hold rows of similar cost and depend neither on `num_shards` nor on `weights`: whatever
    a batch's composition does to a result in the last bit, it does for any number of shards.
    Batches go to the shard with the least work so far, most expensive first (Graham's longest
    processing time rule, https://doi.org/10.1137/0117039).

    Args:
        requests: the rows, in the order of the collected file.
        settings: what changes every row's result.
        batch_size: rows that are computed together.
        num_shards: pieces; never more than there are batches.
        weights: estimated seconds of each row, by which batches are dealt out; its cost without.

    Raises:
        DataError: two requests have the same id.
    """
    row_ids = [request.id for request in requests]
    if len(set(row_ids)) != len(row_ids):
        doubled, _ = Counter(row_ids).most_common(1)[0]
        raise DataError(f"Two rows have the id {doubled!r}", fix="Run `medtrain prepare` again.")
    settings_digest = digest_of(dict(settings))
    row_hashes = tuple(digest_of([settings_digest, r.id, dict(r.payload)])[:32] for r in requests)
    longest_first = sorted(range(len(requests)), key=lambda i: (-requests[i].cost, i))
    batches = [longest_first[i : i + batch_size] for i in range(0, len(longest_first), batch_size)]
    seconds = weights if weights is not None else [request.cost for request in requests]
    shards = _deal(batches, [sum(seconds[i] for i in batch) for batch in batches], num_shards)
    return Plan(
        plan_id=digest_of([_ID_VERSION, settings_digest, row_ids, row_hashes])[:32],
        batch_size=batch_size,
        shards=shards,
        digests=tuple(ids_digest([row_ids[i] for i in rows]) for rows in shards),
        requests=tuple(requests),
        row_hashes=row_hashes,
    )


def ids_digest(row_ids: Sequence[str]) -> str:
    """Digest of row ids in their order."""
    return digest_of(list(row_ids))


def _deal(
    batches: Sequence[Sequence[int]], weights: Sequence[float], num_shards: int
) -> tuple[array[int], ...]:
    """Deal batches to shards; within a shard they keep their order, so that the short one ends."""
    count = max(1, min(num_shards, len(batches)))
    dealt: list[list[int]] = [[] for _ in range(count)]
    loads = [(0.0, 0, shard) for shard in range(count)]
    for batch in sorted(range(len(batches)), key=lambda b: (-weights[b], b)):
        load, held, shard = heapq.heappop(loads)
        dealt[shard].append(batch)
        heapq.heappush(loads, (load + weights[batch], held + 1, shard))
    return tuple(
        array("I", [row for batch in sorted(shard) for row in batches[batch]]) for shard in dealt
    )


def _packed(positions: array[int]) -> str:
    return base64.b64encode(_little_endian(positions).tobytes()).decode("ascii")


def _unpacked(text: str) -> array[int]:
    positions = array("I")
    positions.frombytes(base64.b64decode(text))
    return _little_endian(positions)


def _little_endian(positions: array[int]) -> array[int]:
    if sys.byteorder == "little":
        return positions
    swapped = positions[:]
    swapped.byteswap()
    return swapped
