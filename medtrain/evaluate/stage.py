"""`evaluate`: the variants answer the evaluation split, and what they say is measured.

variants → answers and held-out loss of one model after the other, each released before the next
→ verdicts of the judge → text metrics and decisions → scores.json and rows.jsonl.
Everything that is expensive is in shards or published whole before the judge is asked, so a judge
that is out of reach, or a kill at any moment, costs no answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from medtrain.config import EvaluateConfig, RunConfig
from medtrain.console import Console
from medtrain.data.examples import Example, read_examples
from medtrain.data.tokenizer import load_chat_tokenizer
from medtrain.errors import DataError
from medtrain.evaluate.answers import VariantAnswers, answers_of, read_answers
from medtrain.evaluate.bertscore import BertScore, require_encoder
from medtrain.evaluate.decisions import DecisionReader
from medtrain.evaluate.judging import Verdicts, ask, protocols
from medtrain.evaluate.loss import (
    MAX_ROWS,
    HeldOutLoss,
    encode_references,
    loss_requests,
    measure_losses,
    same_tokens,
)
from medtrain.evaluate.metrics import TEXT_METRICS, TextMetric
from medtrain.evaluate.scores import Skipped, measure, score_rows, score_table
from medtrain.evaluate.variants import Variant, list_variants
from medtrain.files import write_json, write_jsonl
from medtrain.judge import Judge, make_judge
from medtrain.run import Run
from medtrain.shards import Drive, Phase, ShardSet, closing_sets, run_here

if TYPE_CHECKING:
    from medtrain.data.chat import Encoded


class _Answered(NamedTuple):
    """What one loaded model was needed for."""

    answers: VariantAnswers
    loss: HeldOutLoss | None


class _Answering(NamedTuple):
    """The first phase, and what is known before it runs."""

    phase: Phase
    variants: Sequence[Variant]
    skipped: Sequence[Skipped]


def evaluate(
    run: Run, config: RunConfig, console: Console, drive: Drive = run_here
) -> dict[str, Any]:
    """Answer, measure and judge every variant; write run.scores and its rows.

    Returns:
        Counts: questions, variants, failed_answers, verdicts, failed_verdicts; the names of what
        was skipped; and every variant's metric values.

    Raises:
        ConfigError: the judge's key is missing.
        DataError: there is no evaluation row, or a model is missing or broken.
        EndpointError: engine or judge cannot be reached; what is finished is kept.
    """
    examples = _questions(run)
    if config.evaluate.bertscore_model is not None:
        require_encoder(config.evaluate.bertscore_model)
    with _judging(config) as judge:
        with _answering(run, config, console) as answering:
            drive(answering.phase, console)
        answered = [_read(run, config, console, v, answering.phase) for v in answering.variants]
        verdicts = Verdicts()
        if judge is not None:
            asked = ask(run, config, judge, examples, [a.answers for a in answered])
            phase = Phase("verdicts", tuple(asked.sets.values()))
            verdicts = asked.read(config, drive(phase, console))
        return _publish(
            run, config, console, examples, answered, verdicts, judge, answering.skipped
        )


@contextmanager
def phase_of_answers(run: Run, config: RunConfig) -> Iterator[Phase]:
    """The first phase of `evaluate`: the variants' answers, and their held-out losses."""
    with _answering(run, config, Console(run.log)) as answering:
        yield answering.phase


@contextmanager
def phase_of_verdicts(run: Run, config: RunConfig) -> Iterator[Phase]:
    """The second phase of `evaluate`, once the answers are collected."""
    with _judging(config) as judge:
        if judge is None:
            yield Phase("verdicts", ())
            return
        quiet = Console(quiet=True)
        variants = list_variants(run, config, load_chat_tokenizer(run))
        answers = [read_answers(run, config, quiet, variant) for variant in variants]
        asked = ask(run, config, judge, _questions(run), answers)
        yield Phase("verdicts", tuple(asked.sets.values()))


def _questions(run: Run) -> list[Example]:
    examples = list(read_examples(run.eval_rows))
    if not examples:
        raise DataError(
            "There is no evaluation row, so nothing can be evaluated",
            fix="Raise data.eval_fraction, or stop earlier with --until.",
        )
    return examples


@contextmanager
def _judging(config: RunConfig) -> Iterator[Judge | None]:
    if not protocols(config.evaluate):
        yield None
        return
    judge = make_judge(config.judge, config.model)
    try:
        yield judge
    finally:
        judge.close()


@contextmanager
def _answering(run: Run, config: RunConfig, console: Console) -> Iterator[_Answering]:
    examples, chat = _questions(run), load_chat_tokenizer(run)
    references = encode_references(chat, examples) if config.evaluate.held_out_loss else []
    variants = list_variants(run, config, chat)
    sets: list[ShardSet] = []
    skipped: list[Skipped] = []
    for variant in variants:
        answers = answers_of(run, config, variant, examples, console)
        reason = _no_loss(config, variant, examples, references)
        if reason is None:
            sets += [answers, _loss_of(run, config, variant, examples, references)]
        else:
            sets.append(replace(answers, release=_both(answers.release, variant.model.release)))
            skipped += [reason] if reason not in skipped else []
    with closing_sets(Phase("answers", tuple(sets))) as phase:
        yield _Answering(phase, variants, skipped)


def _both(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    def both() -> None:
        first()
        second()

    return both


def _no_loss(
    config: RunConfig,
    variant: Variant,
    examples: Sequence[Example],
    references: Sequence[Encoded],
) -> Skipped | None:
    """Why a variant's held-out loss is not measured, or None."""
    if not config.evaluate.held_out_loss:
        return Skipped("held_out_loss", "evaluate.held_out_loss is off")
    if config.evaluate.engine != "transformers":
        reason = f"engine {config.evaluate.engine} does not load the model here"
        return Skipped("held_out_loss", reason)
    if not same_tokens(references, encode_references(variant.chat, examples)):
        reason = f"{variant.name} has other tokens, and loss a token compares over equal ones only"
        return Skipped("held_out_loss", reason)
    return None


def _loss_of(
    run: Run,
    config: RunConfig,
    variant: Variant,
    examples: Sequence[Example],
    references: Sequence[Encoded],
) -> ShardSet:
    """A variant's held-out loss; the model is the one that answered."""
    return ShardSet(
        key=f"loss.{variant.name}",
        title=f"loss of {variant.name}",
        directory=run.loss_shards(variant.name),
        requests=loss_requests(examples, references),
        settings={
            "model": variant.digest,
            "dtype": config.model.dtype,
            "attention": config.model.attention,
        },
        work=lambda batches: measure_losses(
            variant.model, batches, config.model.attention, Console(run.log, quiet=True)
        ),
        collected=run.held_out_loss(variant.name),
        batch_size=MAX_ROWS,
        num_shards=config.evaluate.num_shards,
        release=variant.model.release,
    )


def _read(
    run: Run, config: RunConfig, console: Console, variant: Variant, phase: Phase
) -> _Answered:
    answers = read_answers(run, config, console, variant)
    measured = phase.by_key(f"loss.{variant.name}")
    return _Answered(answers, HeldOutLoss.read(measured.collected) if measured else None)


def _publish(
    run: Run,
    config: RunConfig,
    console: Console,
    examples: Sequence[Example],
    answered: Sequence[_Answered],
    verdicts: Verdicts,
    judge: Judge | None,
    skipped: Sequence[Skipped],
) -> dict[str, Any]:
    metrics = text_metrics(config.evaluate)
    reader = DecisionReader.of(config.data)
    measures = []
    with console.progress("metrics", total=len(answered), unit="variants") as task:
        for answers, loss in answered:
            measures.append(measure(answers, examples, metrics, reader, loss))
            task.advance()
    skipped = [*skipped, *_not_measured(config.evaluate, examples)]
    scores = score_table(len(examples), measures, verdicts, judge, config.judge.kind, skipped)
    write_jsonl(run.evaluation_rows, score_rows(examples, measures, verdicts))
    write_json(run.scores, scores)
    return _counts(scores, verdicts)


def text_metrics(config: EvaluateConfig) -> list[TextMetric]:
    """The metrics that compare an answer with its reference; BERTScore where it has an encoder."""
    if config.bertscore_model is None:
        return list(TEXT_METRICS)
    return [*TEXT_METRICS, BertScore(config.bertscore_model, config.bertscore_layer)]


def _not_measured(config: EvaluateConfig, examples: Sequence[Example]) -> list[Skipped]:
    reasons = {
        "bertscore_f1": config.bertscore_model is None and "evaluate.bertscore_model is not set",
        "decision_accuracy": all(e.decision is None for e in examples)
        and "no evaluation row has a yes/no/maybe decision",
        "rubric": not config.rubric and "evaluate.rubric is off",
        "rating": not config.rating and "evaluate.rating is off",
        "pairwise": (not config.pairwise and "evaluate.pairwise is off")
        or (len(config.variants) == 1 and "there is only one variant"),
    }
    return [Skipped(metric, reason) for metric, reason in reasons.items() if reason]


def _counts(scores: Mapping[str, Any], verdicts: Verdicts) -> dict[str, Any]:
    variants = scores["variants"]
    return {
        "questions": scores["questions"],
        "variants": len(variants),
        "failed_answers": sum(v["answers"]["failed"] for v in variants),
        "verdicts": verdicts.count,
        "failed_verdicts": verdicts.failed,
        "skipped": [s["metric"] for s in scores["skipped"]],
        "metrics": {
            v["name"]: {name: metric["value"] for name, metric in v["metrics"].items()}
            for v in variants
        },
    }
