"""`pairs`: candidates + verdicts → preferences.jsonl (prompt / chosen / rejected) for DPO.

verdicts of a prompt → at most one preference → ready-made preferences after them. Everything left
out goes to pairs/dropped.jsonl with its reason.

With two candidates, the pair is used if it was decided. With more, the decided pair whose answers
lie furthest apart in wins minus losses is used: the best against the worst, as most work that
samples several answers does (SimPO, https://arxiv.org/abs/2405.14734; PairRM-labelled DPO), with
the difference that the judge must have seen this very pair and decided it. Using all decided pairs
would weigh prompts by how often the judge agreed with itself, and could teach A > B > C > A.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

from medtrain.config import RunConfig
from medtrain.console import Console
from medtrain.data.examples import Example, Preference, read_examples, read_preferences
from medtrain.errors import DataError
from medtrain.files import read_jsonl, write_jsonl
from medtrain.run import Run


def build_pairs(run: Run, config: RunConfig, console: Console) -> dict[str, Any]:
    """Write the preferences that DPO trains on, and the pairs that it does not.

    Returns:
        Counts (`pairs`, `judged`, `ready_made`, `dropped` by reason), `chosen_cut` (chosen answers
        that ran into the token limit), `longer_chosen` (share of judged preferences whose chosen
        answer has more characters) and `position_bias` (see `position_bias`).

    Raises:
        DataError: not one preference is left, or the verdicts do not fit the candidates.
    """
    collected = _Collected()
    collected.judged.extend(_judged(run, collected))
    ready = list(read_preferences(run.ready_preferences)) if run.ready_preferences.exists() else []
    bias = position_bias(read_jsonl(run.verdicts))
    dropped = Counter(row["reason"] for row in collected.dropped)
    write_jsonl(run.dropped_pairs, collected.dropped)
    rows = collected.judged + ready
    if not rows:
        reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(dropped.items()))
        raise DataError(
            f"No preference pair is left for DPO ({reasons or 'there were no candidates'})",
            fix="Sample more widely (generate.temperature, generate.num_samples), use more prompts "
            "(data.max_preference_prompts), or another judge; conflicts can be used one-sidedly "
            "with judge.orders=single.",
        )
    write_jsonl(run.preferences, (row.to_json() for row in rows))
    fields: dict[str, Any] = {reason.replace(" ", "_"): n for reason, n in sorted(dropped.items())}
    console.event(
        "pairs",
        f"{len(rows)} preference pairs ({len(ready)} ready-made), {sum(dropped.values())} left out",
        pairs=len(rows),
        ready_made=len(ready),
        **fields,
    )
    return {
        "pairs": len(rows),
        "judged": len(collected.judged),
        "ready_made": len(ready),
        "dropped": dict(sorted(dropped.items())),
        "chosen_cut": sum(preference.chosen_cut for preference in collected.judged),
        "longer_chosen": _longer_chosen(collected.judged),
        "position_bias": bias,
    }


@dataclass
class _Collected:
    judged: list[Preference] = field(default_factory=list)
    dropped: list[dict[str, str]] = field(default_factory=list)

    def drop(self, row_id: str, reason: str) -> None:
        self.dropped.append({"id": row_id, "reason": reason})


class _Decided(NamedTuple):
    row_id: str
    winner: int
    loser: int


def _judged(run: Run, collected: _Collected) -> Iterator[Preference]:
    """Each prompt's preference."""
    examples = {example.id: example for example in read_examples(run.preference_prompts)}
    candidates = {row["id"]: row.get("candidates", []) for row in read_jsonl(run.candidates)}
    for row_id, found in candidates.items():
        if len(found) < 2:
            collected.drop(row_id, "too few candidates")
    for example_id, verdicts in groupby(read_jsonl(run.verdicts), key=_example_of):
        if example_id not in examples or example_id not in candidates:
            raise DataError(
                f"{run.verdicts} judges the prompt {example_id}, which has no candidates",
                fix="The candidates were made anew: run again with --force judge.",
            )
        decided = [d for row in verdicts if (d := _decided(row, collected)) is not None]
        best = _widest(decided, collected)
        if best is not None:
            answers = {candidate["index"]: candidate for candidate in candidates[example_id]}
            yield _preference(examples[example_id], answers[best.winner], answers[best.loser])


def _example_of(verdict: dict[str, Any]) -> str:
    """The prompt that a verdict is about; of a row that killed its process, only the id is left."""
    return str(verdict["id"].rpartition(":")[0])


def _decided(row: dict[str, Any], collected: _Collected) -> _Decided | None:
    if "error" in row:
        collected.drop(row["id"], "failed")
    elif row["verdict"] == "a":
        return _Decided(row["id"], row["a"], row["b"])
    elif row["verdict"] == "b":
        return _Decided(row["id"], row["b"], row["a"])
    else:
        reason = row["reason"] if row["reason"] == "identical" else row["verdict"]
        collected.drop(row["id"], reason)
    return None


def _widest(decided: list[_Decided], collected: _Collected) -> _Decided | None:
    """The decided pair whose answers lie furthest apart in wins minus losses."""
    wins: Counter[int] = Counter()
    for pair in decided:
        wins[pair.winner] += 1
        wins[pair.loser] -= 1
    ranked = sorted(decided, key=lambda p: (wins[p.loser] - wins[p.winner], p.winner, p.loser))
    best = ranked[0] if ranked and wins[ranked[0].winner] > wins[ranked[0].loser] else None
    for pair in decided:
        if pair is not best:
            collected.drop(pair.row_id, "cycle" if best is None else "another pair is wider")
    return best


def _preference(
    example: Example, chosen: Mapping[str, Any], rejected: Mapping[str, Any]
) -> Preference:
    return Preference(
        id=example.id,
        source=example.source,
        prompt=example.prompt,
        chosen=chosen["text"],
        rejected=rejected["text"],
        chosen_cut=chosen.get("finish") == "length",
        rejected_cut=rejected.get("finish") == "length",
    )


def _longer_chosen(judged: list[Preference]) -> float | None:
    unequal = [p for p in judged if len(p.chosen) != len(p.rejected)]
    if not unequal:
        return None
    return sum(len(p.chosen) > len(p.rejected) for p in unequal) / len(unequal)


def position_bias(verdicts: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
    """How often the place of an answer decided, among pairs that were shown in both orders.

    `first_shown` is the share of pairs in which the answer shown first won in both orders,
    `second_shown` the same for the one shown second; an unbiased judge has few of either, and as
    many of the one as of the other. None where no pair was shown in both orders.
    """
    seen, first_shown, second_shown = 0, 0, 0
    for row in verdicts:
        looks = row.get("orders", ())
        if len(looks) < 2:
            continue
        seen += 1
        first_shown += all(look["winner"] == look["first"] for look in looks)
        second_shown += all(look["winner"] not in (look["first"], "tie") for look in looks)
    if not seen:
        return None
    return {"pairs": seen, "first_shown": first_shown / seen, "second_shown": second_shown / seen}
