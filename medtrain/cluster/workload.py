"""How much a run has to compute: rows, tokens, FLOPs, calls.

the data card where the data are prepared, else the configuration's limits → rows of every split and
tokens of a row → what each stage does with them. What cannot be known yet is None, and shown as
such.

A frozen model of N parameters costs 2 N FLOPs a token forward and 2 N for the gradients of its
inputs (Kaplan et al. 2020, https://arxiv.org/abs/2001.08361, section 2.1, without the 2 N of weight
gradients: only the adapter has those); activation checkpointing adds one more forward. What the
reference of DPO makes of both answers is computed once, before it, by an array of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, comb
from typing import Any, Literal

from medtrain.config import JudgeConfig, RunConfig
from medtrain.errors import DataError
from medtrain.evaluate.judging import protocols, variant_pairs
from medtrain.files import read_json
from medtrain.memory import sides_of
from medtrain.run import Run, Trained

_RULES_TOKENS = 450
"""Of the instructions that a judge gets with every question."""
VERDICT_TOKENS = 120
"""Of a verdict and its justification, which may have 60 words."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Rows of the splits, and tokens of a row."""

    train: int | None
    prompts: int | None
    """Preference prompts."""
    ready: int
    """Ready-made preferences."""
    eval: int | None
    row_tokens: float
    """Of a training row, prompt and answer together."""
    prompt_tokens: float
    """Of its prompt."""
    prepared: bool
    """Whether they were counted, and not taken from limits."""


def sizes_of(run: Run, config: RunConfig, *, prepared: bool) -> Sizes:
    """What the data card says, or where the data are not prepared what the limits allow."""
    if prepared:
        try:
            return _from_card(read_json(run.data_card), config)
        except (FileNotFoundError, DataError, KeyError, TypeError):
            pass  # a card of somebody's own making; the limits still hold
    return _from_limits(config)


def _from_card(card: Mapping[str, Any], config: RunConfig) -> Sizes:
    splits, tokens = card["splits"], card["tokens"]["train"]
    rows = max(1, splits["train"])
    prompt = (tokens["total"] - tokens["supervised"]) / rows
    mean = tokens["total"] / rows
    return Sizes(
        train=splits["train"],
        prompts=splits["preference_prompts"],
        ready=splits["ready_preferences"],
        eval=splits["eval"],
        row_tokens=mean,
        prompt_tokens=prompt if config.sft.loss_on == "assistant" else mean / 2,
        prepared=True,
    )


def _from_limits(config: RunConfig) -> Sizes:
    data = config.data
    sources = [s for s in data.sources if s.adapter != "preferences"]
    limits = [s.limit for s in sources]
    known = [limit for limit in limits if limit is not None]
    rows = sum(known) if len(known) == len(limits) else None
    rows = _least(rows, data.max_rows)
    train, prompts, held_out = None, None, None
    if rows is not None:
        held_out = round(rows * data.eval_fraction)
        prompts = round(rows * data.preference_fraction)
        train = rows - held_out
        if data.preference_prompts_from == "train":
            prompts = train
        else:
            train -= prompts
    return Sizes(
        train=train,
        prompts=_least(prompts, data.max_preference_prompts),
        ready=sum(s.limit or 0 for s in data.sources if s.adapter == "preferences"),
        eval=_least(held_out, data.max_eval_rows),
        row_tokens=config.sft.max_length / 2,
        prompt_tokens=config.sft.max_length / 4,
        prepared=False,
    )


def _least(*limits: int | None) -> int | None:
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


@dataclass(frozen=True, slots=True)
class TrainingLoad:
    """What a training reads."""

    rows: int | None
    """Rows, or pairs; None where nobody knows yet."""
    rows_a_step: int
    steps: int | None
    tokens: float | None
    """Over all epochs and processes; a pair's are those of both sides."""


def training_load(config: RunConfig, sizes: Sizes, stage: Trained, processes: int) -> TrainingLoad:
    """What a training stage reads with so many processes."""
    section = config.sft if stage == "sft" else config.dpo
    rows_a_step = section.batch_size * section.gradient_accumulation * max(1, processes)
    all_rows = sizes.train if stage == "sft" else _preferences(sizes)
    rows = None if all_rows is None else round(all_rows * (1 - section.validation_fraction))
    steps = section.max_steps
    if steps is None and rows is not None:
        steps = ceil(section.epochs * max(1, ceil(rows / rows_a_step)))
    if section.max_steps is not None:
        read: float | None = float(section.max_steps * rows_a_step)
    else:
        read = None if rows is None else rows * section.epochs
    a_row = _row_tokens(config, sizes, stage)
    return TrainingLoad(rows, rows_a_step, steps, None if read is None else read * a_row)


def reference_tokens(config: RunConfig, sizes: Sizes) -> float | None:
    """Tokens of all pairs, which DPO's reference reads once."""
    pairs = _preferences(sizes)
    return None if pairs is None else pairs * _row_tokens(config, sizes, "dpo")


def _row_tokens(config: RunConfig, sizes: Sizes, stage: Trained) -> float:
    """Of a row that is trained on; of a pair, those of both sides."""
    section = config.sft if stage == "sft" else config.dpo
    answer = sizes.row_tokens - sizes.prompt_tokens
    if stage == "dpo":
        answer = max(answer, config.generate.max_new_tokens) if sizes.prompts != 0 else answer
    return min(section.max_length, sizes.prompt_tokens + answer) * sides_of(config, stage)


def _preferences(sizes: Sizes) -> int | None:
    """Pairs for DPO: at most one a prompt, and the ready-made."""
    return None if sizes.prompts is None else sizes.prompts + sizes.ready


def flops_a_token(parameters: float, *, checkpointing: bool) -> float:
    """FLOPs of training on a token."""
    return (6 if checkpointing else 4) * parameters


@dataclass(frozen=True, slots=True)
class Calls:
    """What a judge is asked."""

    rows: int
    """Verdicts: one a pair, in both orders, or one an answer."""
    calls: int
    prompt_tokens: float
    """Of one call."""

    @property
    def tokens(self) -> float:
        """Read and written, of all calls."""
        return self.calls * (self.prompt_tokens + VERDICT_TOKENS)


def judged(config: RunConfig, sizes: Sizes, stage: Literal["judge", "evaluate"]) -> Calls | None:
    """What is put to the judge in a stage; None where the number of rows is not known."""
    answers = config.generate if stage == "judge" else config.evaluate
    shown = orders(config.judge)
    if stage == "judge":
        pairs = comb(config.generate.num_samples, 2)
        counts = {"pairwise": (pairs, shown)}
        rows = sizes.prompts
    else:
        names = [v if isinstance(v, str) else v.name for v in config.evaluate.variants]
        shapes = {"pairwise": (len(variant_pairs(names)), shown)}
        single = (len(names), 1)
        counts = {p: shapes.get(p, single) for p in protocols(config.evaluate)}
        rows = _least(sizes.eval, config.evaluate.max_judged)
    if rows is None:
        return None
    calls = sum(rows * each * times for each, times in counts.values())
    compared = sum(rows * each * times for p, (each, times) in counts.items() if p == "pairwise")
    # Question and reference, and one answer or two.
    shown_answers = (calls + compared) * answers.max_new_tokens
    tokens = _RULES_TOKENS + sizes.row_tokens + (shown_answers / calls if calls else 0)
    return Calls(sum(rows * each for each, _ in counts.values()), calls, tokens)


def orders(judge: JudgeConfig) -> int:
    """How often a pair is shown to the judge."""
    return 2 if judge.orders == "both" else 1


def words(value: float) -> str:
    """A number in two digits, since more would pretend to be known: 340, 1.2 k, 3.4 M."""
    value = float(f"{value:.1e}")
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:g} {unit}"
    return f"{value:g}"


def duration(seconds: float) -> str:
    """A time in two digits: 35 s, 12 min, 3.4 h, 2.1 d."""
    for unit, scale in (("d", 86_400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * scale or (unit == "h" and seconds >= scale):
            return f"{float(f'{seconds / scale:.1e}'):g} {unit}"
    return f"{float(f'{seconds:.1e}'):g} s"
