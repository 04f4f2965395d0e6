"""Which rows killed their processes: a row that dies each time must not stop its shard for ever.

An attempt that died (no end mark, no living process) leaves rows that it had pulled and not
finished. Twice in a row the same ones, with no row finished in between, makes them suspects: the
next attempt computes each of them alone, after everything else. A suspect that dies alone is given
up on, and so is the only row in flight of two such deaths. An attempt that was preempted, timed out
or failed with an error has ended, and says nothing about its rows; nor does one that died before it
pulled any.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from medtrain.shards.history import PastAttempt

_DEATHS_IN_A_ROW = 2
"""Deaths without a new row between them, until the rows in flight are suspects."""
_DEATHS_WITH_PROGRESS = 4
"""Deaths in a row with the same row in flight, while others were finished: engines with many rows
in flight go on finishing some until one kills them."""


class Suspicion(NamedTuple):
    """What deaths say about rows."""

    alone: frozenset[str]
    """To be computed one by one, after everything else."""
    given_up: dict[str, int]
    """Row → how many processes died while it was computed."""


def suspicion(past: Sequence[PastAttempt]) -> Suspicion:
    """Judge a shard's rows by its earlier attempts, the first one first."""
    seen: set[str] = set()
    done: set[str] = set()
    deaths: Counter[str] = Counter()
    stuck: Counter[str] = Counter()
    recurring: Counter[str] = Counter()
    alone: set[str] = set()
    given_up: set[str] = set()
    last_death = 0.0
    for attempt in past:
        progress = not attempt.results.keys() <= seen
        seen |= attempt.results.keys()
        done |= {row for row, result in attempt.results.items() if is_final(result)}
        stuck = Counter() if progress else stuck
        flying = _in_flight(attempt, done) if attempt.died else set()
        # Writers that lived at the same time may have been killed by one hand: that is one death.
        if not flying or attempt.began < last_death:
            continue
        last_death = attempt.last_seen
        deaths.update(flying)
        recurring = _one_more(recurring, flying)
        stuck = stuck if progress else _one_more(stuck, flying)
        suspects = {row for row in flying if stuck[row] >= _DEATHS_IN_A_ROW}
        if len(flying) == 1:
            given_up |= flying & (_lone_rows(attempt) | suspects & _own_batches(attempt))
        alone |= suspects | {row for row in flying if recurring[row] >= _DEATHS_WITH_PROGRESS}
    verdicts = {row: deaths[row] for row in sorted(given_up - done)}
    return Suspicion(frozenset(alone - done - given_up), verdicts)


def quarantined(deaths: int) -> dict[str, Any]:
    """The result of a row that was given up on."""
    return {
        "error": f"its process died {deaths} times while it was computed",
        "quarantined": True,
    }


def is_final(result: Mapping[str, Any]) -> bool:
    """Whether a row is not to be tried again by a later attempt: it has no error, or none that
    trying would mend."""
    return "error" not in result or bool(result.get("quarantined"))


def _in_flight(attempt: PastAttempt, done: set[str]) -> set[str]:
    begun = {row for pulled in attempt.pulled for row in pulled.rows}
    return begun - done - attempt.results.keys()


def _lone_rows(attempt: PastAttempt) -> set[str]:
    return {row for pulled in attempt.pulled if pulled.alone for row in pulled.rows}


def _own_batches(attempt: PastAttempt) -> set[str]:
    return {pulled.rows[0] for pulled in attempt.pulled if len(pulled.rows) == 1}


def _one_more(counts: Counter[str], rows: set[str]) -> Counter[str]:
    return Counter({row: counts[row] + 1 for row in rows})
