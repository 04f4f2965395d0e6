"""Answers to a split's questions, as sharded work: what `generate` and `evaluate` share.

examples → prompts and seeds → one request an example → shards → engine → collected file.
The engine is made once and lives through all shards that one process computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medtrain.config import EvaluateConfig, GenerateConfig, RunConfig
from medtrain.console import Console
from medtrain.data.examples import Example
from medtrain.generate.engine import Answer, ModelSource, Prompt, make_engine
from medtrain.generate.sampling import Sampling, row_seed
from medtrain.shards import Request, ShardSet

if TYPE_CHECKING:
    from medtrain.data.chat import ChatTokenizer

AsRow = Callable[[tuple[Answer, ...]], dict[str, Any]]
"""The answers of one example → its line in the collected file, the id left out."""


def answer_shards(
    examples: Sequence[Example],
    *,
    config: RunConfig,
    section: GenerateConfig | EvaluateConfig,
    source: ModelSource,
    chat: ChatTokenizer,
    directory: Path,
    collected: Path,
    as_row: AsRow,
    key: str,
    title: str,
    measured_in: Path | None = None,
    console: Console | None = None,
) -> ShardSet:
    """The answers to every example's prompt as a shard set.

    Args:
        examples: their reference answers are not looked at.
        config: the run's seed, and how its models are loaded.
        section: engine, sampling, batch size and number of shards.
        source: the model that answers.
        chat: its chat format.
        directory: of the shards.
        collected: one line an example: `{"id", **as_row(answers)}` or `{"id", "error"}`.
        as_row: what a line holds.
        key: of the shard set.
        title: of the work, for people.
        measured_in: shards of an earlier stage that answered, for their seconds.
        console: is told how answers are decoded; None tells nobody.
    """
    sampling = Sampling.of(section)
    prompts = {p.id: p for p in make_prompts(examples, chat, sampling, config.seed)}
    engine = make_engine(section, config.model, source, chat, sampling, console, len(prompts))

    def work(batches: Iterable[list[Request]]) -> Iterator[tuple[str, dict[str, Any]]]:
        for done in engine.answer([prompts[r.id] for r in batch] for batch in batches):
            yield done.id, {"error": done.error} if done.error else as_row(done.answers)

    return ShardSet(
        key=key,
        title=title,
        directory=directory,
        requests=[_request(prompt, section) for prompt in prompts.values()],
        settings=_settings(config, section, source, chat, sampling),
        work=work,
        collected=collected,
        # At an endpoint rows are no neighbours: alone in its batch, a finished one is not asked
        # for again because another one failed.
        batch_size=1 if section.engine == "openai" else section.prompts_together,
        num_shards=section.num_shards,
        measured_in=measured_in,
        release=engine.close,
    )


def make_prompts(
    examples: Sequence[Example], chat: ChatTokenizer, sampling: Sampling, seed: int
) -> list[Prompt]:
    """The examples' prompts in the chat format, with a seed for every answer wanted."""
    encoded = chat.encode_prompts([example.prompt for example in examples])
    return [
        Prompt(
            id=example.id,
            messages=example.prompt,
            token_ids=tuple(token_ids),
            seeds=tuple(row_seed(seed, example.id, i) for i in range(sampling.num_samples)),
        )
        for example, token_ids in zip(examples, encoded, strict=True)
    ]


def _request(prompt: Prompt, section: GenerateConfig | EvaluateConfig) -> Request:
    """A row of the plan: an endpoint is sent the messages, a model here the tokens.

    Its cost is the prompt's length: the plan lays rows of similar cost together, and equal lengths
    are what keeps a batch free of padding.
    """
    sent = prompt.messages if section.engine == "openai" else prompt.token_ids
    payload = {"prompt": list(sent), "seeds": list(prompt.seeds) if section.temperature else []}
    length, budget = len(prompt.token_ids), section.max_new_tokens
    return Request(
        prompt.id,
        payload,
        cost=length + budget,
        prompt_tokens=length,
        max_answer_tokens=budget * len(prompt.seeds),
    )


def _settings(
    config: RunConfig,
    section: GenerateConfig | EvaluateConfig,
    source: ModelSource,
    chat: ChatTokenizer,
    sampling: Sampling,
) -> dict[str, Any]:
    return {
        "engine": section.engine,
        "model": source.digest,
        "dtype": config.model.dtype,
        "stop_token_ids": list(chat.stop_token_ids),
        "sampling": sampling.settings(),
    }
