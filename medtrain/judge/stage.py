"""`judge`: candidate answers → a verdict on every pair of them.

candidates and the prompts they answer → one request a pair → shards → verdicts.jsonl: a line a
pair, with the winner of every look, or the error that left it undecided.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import combinations
from typing import Any

from medtrain.config import RunConfig
from medtrain.console import Console
from medtrain.data.examples import Example, read_examples
from medtrain.errors import DataError, EndpointError
from medtrain.files import read_jsonl, write_jsonl
from medtrain.judge.concurrency import judge_batches
from medtrain.judge.protocol import Judge, JudgedQuestion, compare_in_orders, make_judge
from medtrain.run import Run
from medtrain.shards import Drive, Phase, Request, ShardSet, run_here

_CHARS_PER_TOKEN = 4


def judge(run: Run, config: RunConfig, console: Console, drive: Drive = run_here) -> dict[str, Any]:
    """Compare every two candidates of every prompt, in one or both orders.

    Returns:
        Counts: pairs, a_wins, b_wins, ties, identical, conflicts, failed, calls, tokens; and who
        judged.

    Raises:
        ConfigError: the judge's key is missing.
        DataError: the candidates do not belong to this run's prompts.
        EndpointError: the judge cannot be reached, or too many pairs failed. Verdicts that were
            reached are kept, and the next run asks for the others only.
    """
    with verdicts(run, config) as (phase, referee):
        if referee is None:
            write_jsonl(run.verdicts, [])
            return dict(count_verdicts(iter(())))
        pairs = len(phase.sets[0].requests)
        console.event("judge", f"{pairs} pairs, judged by {referee.label}", pairs=pairs)
        drive(phase, console)
    counts = count_verdicts(read_jsonl(run.verdicts))
    _check_failures(run, config, counts)
    return {"judge": referee.label, "stand_in": referee.is_stand_in, **counts}


@contextmanager
def phase_of_verdicts(run: Run, config: RunConfig) -> Iterator[Phase]:
    """The phase of `judge`: one shard set, or none where there are no pairs."""
    with verdicts(run, config) as (phase, _):
        yield phase


@contextmanager
def verdicts(run: Run, config: RunConfig) -> Iterator[tuple[Phase, Judge | None]]:
    """The phase and its judge; where there is nothing to judge, there is no need of a key."""
    requests = list(pair_requests(run))
    if not requests:
        yield Phase("verdicts", ()), None
        return
    referee = make_judge(config.judge, config.model)
    shard_set = ShardSet(
        key="verdicts",
        title="judge",
        directory=run.judge,
        requests=requests,
        settings={"judge": referee.settings(), "orders": config.judge.orders},
        work=lambda batches: _verdicts(referee, batches, config),
        collected=run.verdicts,
        batch_size=referee.batch_size,
        num_shards=config.judge.num_shards,
    )
    try:
        yield Phase("verdicts", (shard_set,)), referee
    finally:
        referee.close()


def pair_requests(run: Run) -> Iterator[Request]:
    """A request for every two candidates of every prompt, in the order of the candidates.

    Raises:
        DataError: a candidate row names no prompt of this run.
    """
    examples = {example.id: example for example in read_examples(run.preference_prompts)}
    for row in read_jsonl(run.candidates):
        example = examples.get(row["id"])
        if example is None:
            raise DataError(
                f"{run.candidates} answers the prompt {row['id']}, which is not in "
                f"{run.preference_prompts}",
                fix="The prompts were made anew: run again with --force generate.",
            )
        yield from _pairs_of(example, row)


def _pairs_of(example: Example, row: dict[str, Any]) -> Iterator[Request]:
    question = JudgedQuestion.of(example)
    texts = {c["index"]: c["text"] for c in row.get("candidates", [])}
    for a, b in combinations(sorted(texts), 2):
        payload = {
            "example": example.id,
            "a": a,
            "b": b,
            "question": question.question,
            "reference": question.reference,
            "answers": [texts[a], texts[b]],
        }
        chars = sum(map(len, (question.question, question.reference, texts[a], texts[b])))
        tokens = chars / _CHARS_PER_TOKEN
        yield Request(f"{example.id}:{a}-{b}", payload, cost=1 + tokens, prompt_tokens=int(tokens))


def _verdicts(
    referee: Judge, batches: Iterable[list[Request]], config: RunConfig
) -> Iterator[tuple[str, dict[str, Any]]]:
    place: dict[str, dict[str, Any]] = {}

    def placed() -> Iterator[list[Request]]:
        for batch in batches:
            place.update((r.id, {k: r.payload[k] for k in ("example", "a", "b")}) for r in batch)
            yield batch

    def one(request: Request) -> dict[str, Any]:
        question = JudgedQuestion(request.payload["question"], request.payload["reference"])
        a, b = request.payload["answers"]
        return compare_in_orders(referee, question, a, b, config.judge.orders).to_json()

    for row_id, result in judge_batches(referee, placed(), one, config.judge.concurrency):
        yield row_id, {**place.pop(row_id), **result}


def count_verdicts(rows: Iterator[dict[str, Any]]) -> dict[str, int]:
    """How often each verdict was reached, and what it took.

    `ties` and `identical` are apart: an identical pair was never shown to the judge.
    """
    counts: Counter[str] = Counter()
    for row in rows:
        counts["pairs"] += 1
        counts["tokens"] += row.get("tokens", 0)
        counts["calls"] += len(row.get("orders", ()))
        if "error" in row:
            counts["failed"] += 1
        elif row["reason"] == "identical":
            counts["identical"] += 1
        else:
            counts[_COUNTED_AS[row["verdict"]]] += 1
    names = ("pairs", *_COUNTED_AS.values(), "identical", "failed", "calls", "tokens")
    return {name: counts[name] for name in names}


_COUNTED_AS = {"a": "a_wins", "b": "b_wins", "tie": "ties", "conflict": "conflicts"}


def _check_failures(run: Run, config: RunConfig, counts: dict[str, int]) -> None:
    allowed = config.judge.max_failed_fraction
    if counts["failed"] <= allowed * counts["pairs"]:
        return
    first = next(row for row in read_jsonl(run.verdicts) if "error" in row)
    raise EndpointError(
        f"{counts['failed']} of {counts['pairs']} pairs have no verdict, more than "
        f"judge.max_failed_fraction ({allowed:g}) allows; the first, {first['id']}: "
        f"{first['error']}",
        fix="The other verdicts are kept: run the same command again to ask for the missing ones "
        "only, or raise judge.max_failed_fraction.",
    )
