"""Judging the variants' answers: rubric grades, one rating, and pairs of variants.

examples, answers → the rows that are judged → requests a protocol → shards → verdicts by key.
Pairs are each variant with the one before it, and the last with the first. Which rows are judged
under `evaluate.max_judged` is a matter of their ids, so it is the same for every variant and does
not move when rows are added elsewhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from medtrain.config import EvaluateConfig, RunConfig
from medtrain.data.examples import Example
from medtrain.errors import EndpointError
from medtrain.evaluate.answers import VariantAnswers
from medtrain.files import read_jsonl
from medtrain.judge import Judge, JudgedQuestion, compare_in_orders, judge_batches
from medtrain.run import Run
from medtrain.shards import Request, ShardSet, ShardSummary

_CHARS_PER_TOKEN = 4
ProtocolName = Literal["rubric", "rating", "pairwise"]
Verdict = dict[str, Any]
"""A row of a collected verdicts file; it has `error` where the judge failed on it."""


class Key(NamedTuple):
    """What a verdict is about."""

    example: str
    variants: tuple[str, ...]
    """One name, or the two of a pair."""

    @property
    def request_id(self) -> str:
        """Unique within a protocol: neither part holds a colon."""
        return ":".join((self.example, *self.variants))


@dataclass(frozen=True)
class Verdicts:
    """Everything the judge said."""

    rubric: Mapping[Key, Verdict] = field(default_factory=dict)
    rating: Mapping[Key, Verdict] = field(default_factory=dict)
    pairwise: Mapping[Key, Verdict] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Verdicts, failed ones included."""
        return len(self.rubric) + len(self.rating) + len(self.pairwise)

    @property
    def failed(self) -> int:
        """Rows the judge failed on."""
        return sum(
            "error" in v for p in (self.rubric, self.rating, self.pairwise) for v in p.values()
        )


@dataclass(frozen=True)
class Asked:
    """What is put to the judge: a shard set a protocol, and what its rows are about."""

    sets: dict[ProtocolName, ShardSet]
    keys: dict[ProtocolName, tuple[Key, ...]]

    def read(self, config: RunConfig, summaries: Sequence[ShardSummary]) -> Verdicts:
        """The collected verdicts.

        Args:
            config: holds `judge.max_failed_fraction`.
            summaries: of the sets, in their order.

        Raises:
            EndpointError: the judge failed on more rows of a protocol than are allowed.
        """
        found = {}
        for (protocol, shard_set), summary in zip(self.sets.items(), summaries, strict=True):
            _check_failures(protocol, shard_set, summary, config.judge.max_failed_fraction)
            by_id = {row.pop("id"): row for row in read_jsonl(shard_set.collected)}
            found[protocol] = {key: by_id[key.request_id] for key in self.keys[protocol]}
        return Verdicts(**found)


def ask(
    run: Run,
    config: RunConfig,
    judge: Judge,
    examples: Sequence[Example],
    answers: Sequence[VariantAnswers],
) -> Asked:
    """Every protocol that is switched on, as a shard set."""
    chosen = judged_examples(examples, config.evaluate.max_judged)
    session = _Session(run, config, judge, chosen, answers)
    wanted = protocols(config.evaluate)
    asked: dict[ProtocolName, tuple[ShardSet, tuple[Key, ...]]] = {
        name: session.protocol(name) for name in wanted
    }
    return Asked({n: s for n, (s, _) in asked.items()}, {n: k for n, (_, k) in asked.items()})


def protocols(config: EvaluateConfig) -> list[ProtocolName]:
    """The protocols that are switched on and have something to compare."""
    switches: dict[ProtocolName, bool] = {
        "rubric": config.rubric,
        "rating": config.rating,
        "pairwise": config.pairwise and len(config.variants) > 1,
    }
    return [name for name, on in switches.items() if on]


def judged_examples(examples: Sequence[Example], limit: int | None) -> list[Example]:
    """At most `limit` examples, drawn by a hash of their ids, in their own order."""
    if limit is None or limit >= len(examples):
        return list(examples)
    ranked = sorted(examples, key=lambda e: hashlib.sha256(f"judged:{e.id}".encode()).digest())
    kept = {example.id for example in ranked[:limit]}
    return [example for example in examples if example.id in kept]


def variant_pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Each variant with the one before it, and with more than two the last with the first."""
    pairs = list(pairwise(names))
    return [*pairs, (names[0], names[-1])] if len(names) > 2 else pairs


class _Session:
    """One judge, one set of rows, one set of answers."""

    def __init__(
        self,
        run: Run,
        config: RunConfig,
        judge: Judge,
        examples: Sequence[Example],
        answers: Sequence[VariantAnswers],
    ) -> None:
        self._run, self._config, self._judge = run, config, judge
        self._examples = examples
        self._texts = {a.name: a.texts for a in answers}

    def protocol(self, name: ProtocolName) -> tuple[ShardSet, tuple[Key, ...]]:
        """A protocol's shard set, and what its rows are about."""
        if name == "rubric":
            return self._shard_set(name, self._single_requests(), self._grade, {})
        if name == "rating":
            scale = {"scale": self._config.judge.rating_scale}
            return self._shard_set(name, self._single_requests(), self._rate, scale)
        orders = {"orders": self._config.judge.orders}
        return self._shard_set(name, self._pair_requests(), self._compare, orders)

    def _grade(self, request: Request) -> Verdict:
        """An answer by the rubric."""
        grades = self._judge.grade(_question(request), request.payload["answer"])
        return {**grades.to_json(), **_tokens(grades.tokens)}

    def _rate(self, request: Request) -> Verdict:
        """An answer in one number."""
        scale = self._config.judge.rating_scale
        rating = self._judge.rate(_question(request), request.payload["answer"], scale)
        return {**rating.to_json(), **_tokens(rating.tokens)}

    def _compare(self, request: Request) -> Verdict:
        """Two variants' answers."""
        a, b = request.payload["a"], request.payload["b"]
        orders = self._config.judge.orders
        return compare_in_orders(self._judge, _question(request), a, b, orders).to_json()

    def _single_requests(self) -> dict[Key, Request]:
        requests = {}
        for name, texts in self._texts.items():
            for example in self._examples:
                if example.id in texts:
                    key = Key(example.id, (name,))
                    requests[key] = _request(key, example, answer=texts[example.id])
        return requests

    def _pair_requests(self) -> dict[Key, Request]:
        requests = {}
        for first, second in variant_pairs(list(self._texts)):
            for example in self._examples:
                a, b = self._texts[first].get(example.id), self._texts[second].get(example.id)
                if a is not None and b is not None:
                    key = Key(example.id, (first, second))
                    requests[key] = _request(key, example, a=a, b=b)
        return requests

    def _shard_set(
        self,
        protocol: ProtocolName,
        requests: Mapping[Key, Request],
        one: Callable[[Request], Verdict],
        settings: Mapping[str, Any],
    ) -> tuple[ShardSet, tuple[Key, ...]]:
        concurrency = self._config.judge.concurrency
        shard_set = ShardSet(
            key=protocol,
            title=f"judge {protocol}",
            directory=self._run.evaluate_judge(protocol),
            requests=list(requests.values()),
            settings={"protocol": protocol, "judge": self._judge.settings(), **settings},
            work=lambda batches: judge_batches(self._judge, batches, one, concurrency),
            collected=self._run.evaluate_verdicts(protocol),
            batch_size=self._judge.batch_size,
            num_shards=self._config.judge.num_shards,
            measured_in=self._run.judge,
        )
        return shard_set, tuple(requests)


def _check_failures(
    protocol: ProtocolName, shard_set: ShardSet, summary: ShardSummary, allowed: float
) -> None:
    if summary.rows and summary.errors > allowed * summary.rows:
        raise EndpointError(
            f"The judge failed on {summary.errors} of {summary.rows} rows of {protocol}: more "
            f"than judge.max_failed_fraction={allowed:g} allows",
            fix=f"The reasons are in {shard_set.collected}. Run the same command again to ask for "
            "the failed rows again; finished rows are kept.",
        )


def _request(key: Key, example: Example, **texts: str) -> Request:
    question = JudgedQuestion.of(example)
    payload = {"question": question.question, "reference": question.reference, **texts}
    # Characters stand for tokens: only the proportions matter.
    chars = sum(map(len, payload.values()))
    return Request(key.request_id, payload, cost=chars, prompt_tokens=chars // _CHARS_PER_TOKEN)


def _question(request: Request) -> JudgedQuestion:
    return JudgedQuestion(request.payload["question"], request.payload["reference"])


def _tokens(tokens: int) -> dict[str, int]:
    return {"tokens": tokens} if tokens else {}
