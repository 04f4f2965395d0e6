"""Every variant answers the evaluation questions, once.

questions in the variant's chat format → shards → the engine → answers.jsonl: a line a question,
`{"id", "text", "tokens", "finish"}`, or `{"id", "error"}` where an endpoint failed on it for good.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

from medtrain.config import RunConfig
from medtrain.console import Console
from medtrain.data.examples import Example
from medtrain.errors import DataError, EndpointError
from medtrain.evaluate.variants import Variant
from medtrain.files import read_jsonl
from medtrain.generate.answering import answer_shards
from medtrain.generate.engine import Answer
from medtrain.run import Run
from medtrain.shards import ShardSet

Row = dict[str, Any]


@dataclass(frozen=True)
class VariantAnswers:
    """One variant's answers."""

    name: str
    path: str
    """Where the model is, for people."""
    rows: dict[str, Row]
    """By example id: text, tokens, finish, or error."""

    @cached_property
    def texts(self) -> dict[str, str]:
        """The answers by example id; rows the engine failed on are left out."""
        return {i: row["text"] for i, row in self.rows.items() if "error" not in row}

    @property
    def failed(self) -> int:
        """Questions the engine failed on."""
        return len(self.rows) - len(self.texts)

    def figures(self) -> dict[str, Any]:
        """How many answers there are, how long they are, and how many came to an end."""
        answered = [row for row in self.rows.values() if "error" not in row]
        lengths = [row["tokens"] for row in answered]
        stopped = [row["finish"] == "stop" for row in answered]
        return {
            "rows": len(answered),
            "failed": self.failed,
            "mean_tokens": fmean(lengths) if lengths else None,
            "stopped_share": fmean(stopped) if stopped else None,
            "lengths": lengths,
        }


def answers_of(
    run: Run, config: RunConfig, variant: Variant, examples: Sequence[Example], console: Console
) -> ShardSet:
    """One variant's answers as a shard set."""
    return answer_shards(
        examples,
        config=config,
        section=config.evaluate,
        source=variant.source,
        chat=variant.chat,
        directory=run.answers_shards(variant.name),
        collected=run.answers(variant.name),
        as_row=_as_row,
        key=f"answers.{variant.name}",
        title=f"answer {variant.name}",
        measured_in=run.generate,
        console=console,
    )


def read_answers(run: Run, config: RunConfig, console: Console, variant: Variant) -> VariantAnswers:
    """One variant's collected answers.

    Raises:
        EndpointError: the engine's endpoint failed on every question.
        DataError: no question fits the model's context.
    """
    collected = run.answers(variant.name)
    if not collected.exists():
        raise DataError(
            f"The answers of {variant.name} are not collected yet",
            fix=f"Collect them: medtrain collect {run.root} evaluate",
        )
    rows = {row.pop("id"): row for row in read_jsonl(collected)}
    answers = VariantAnswers(variant.name, variant.shown_as, rows)
    if not answers.texts:
        first = next(iter(rows.values()))["error"]
        kind = EndpointError if config.evaluate.engine == "openai" else DataError
        raise kind(
            f"{variant.name} answered none of {len(rows)} questions; the first error: {first}",
            fix=f"All reasons are in {collected}. The same command tries the questions again.",
        )
    if answers.failed:
        console.warn(
            "answers_failed",
            f"{variant.name} has no answer to {answers.failed} of {len(rows)} questions; they are "
            "left out of its scores",
            variant=variant.name,
            failed=answers.failed,
        )
    return answers


def _as_row(answers: tuple[Answer, ...]) -> Row:
    return answers[0]._asdict()
