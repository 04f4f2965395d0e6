"""The stage `generate`: several answers to every preference prompt, by the SFT model.

data/preferences_prompts.jsonl + sft/merged → shards → generate/candidates.jsonl: a line a prompt,
`{"id", "candidates": [{"index", "text", "tokens", "finish"}, …], "tokens"}`, or `{"id", "error"}`.
An empty answer is an answer: it is kept, judged and counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from typing import Any

from medtrain.config import RunConfig
from medtrain.console import Console
from medtrain.data.examples import read_examples
from medtrain.data.tokenizer import load_chat_tokenizer
from medtrain.errors import DataError, MedtrainError
from medtrain.files import read_jsonl, write_jsonl
from medtrain.generate.answering import answer_shards
from medtrain.generate.digest import model_digest
from medtrain.generate.engine import Answer, ModelSource
from medtrain.run import Run
from medtrain.shards import Drive, Phase, closing_sets, run_here

Counts = dict[str, Any]


def generate(run: Run, config: RunConfig, console: Console, drive: Drive = run_here) -> Counts:
    """Answer the preference prompts and count what came of it.

    Raises:
        DataError: there is no SFT model yet.
        MedtrainError: not one prompt could be answered.
    """
    with phase_of_candidates(run, config, console) as phase:
        if not phase.sets:
            write_jsonl(run.candidates, [])
            console.event(
                "no_prompts", "No preference prompts: DPO will train on the ready-made pairs alone"
            )
            return count_candidates(run)
        drive(phase, console)
    counts = count_candidates(run)
    _complain(counts, run, config, console)
    return counts


@contextmanager
def phase_of_candidates(
    run: Run, config: RunConfig, console: Console | None = None
) -> Iterator[Phase]:
    """The phase of `generate`: one shard set, or none where there are no prompts."""
    examples = list(read_examples(run.preference_prompts))
    if not examples:
        yield Phase("candidates", ())
        return
    shard_set = answer_shards(
        examples,
        config=config,
        section=config.generate,
        source=_sft_model(run, config),
        chat=load_chat_tokenizer(run),
        directory=run.generate,
        collected=run.candidates,
        as_row=_as_row,
        key="candidates",
        title="generate",
        console=console or Console(run.log),
    )
    with closing_sets(Phase("candidates", (shard_set,))) as phase:
        yield phase


def count_candidates(run: Run) -> Counts:
    """Figures of the collected answers; shares and means are None where there is no answer."""
    counts = {"prompts": 0, "failed_prompts": 0, "answers": 0, "empty_answers": 0}
    counts["identical_pairs"] = tokens = stopped = 0
    for row in read_jsonl(run.candidates):
        counts["prompts"] += 1
        counts["failed_prompts"] += "error" in row
        candidates = row.get("candidates", [])
        texts = [candidate["text"] for candidate in candidates]
        counts["answers"] += len(texts)
        counts["empty_answers"] += texts.count("")
        counts["identical_pairs"] += sum(a == b for a, b in combinations(texts, 2))
        tokens += sum(candidate["tokens"] for candidate in candidates)
        stopped += sum(candidate["finish"] == "stop" for candidate in candidates)
    answers = counts["answers"]
    return {
        **counts,
        "mean_tokens": round(tokens / answers, 2) if answers else None,
        "stopped_share": round(stopped / answers, 4) if answers else None,
    }


def _as_row(answers: tuple[Answer, ...]) -> dict[str, Any]:
    return {
        "candidates": [{"index": i, **a._asdict()} for i, a in enumerate(answers)],
        "tokens": sum(answer.tokens for answer in answers),
    }


def _sft_model(run: Run, config: RunConfig) -> ModelSource:
    path = run.merged("sft")
    if not path.is_dir():
        raise DataError(
            f"The merged SFT model {path} is missing", fix="Run the stages before `generate`."
        )

    def load() -> Any:
        from medtrain.train.model import load_merged

        return load_merged(path, config)

    return ModelSource(path=str(path), digest=model_digest(path), load=load, name="sft")


def _complain(counts: Counts, run: Run, config: RunConfig, console: Console) -> None:
    if counts["failed_prompts"] == counts["prompts"]:
        raise MedtrainError(
            f"Not one of {counts['prompts']} prompts could be answered",
            fix=f"The reasons are in {run.candidates}; running again tries all of them again.",
        )
    if counts["failed_prompts"]:
        console.warn(
            "prompts_failed",
            f"{counts['failed_prompts']} of {counts['prompts']} prompts have no answers and are "
            f"left out; the reasons are in {run.candidates}",
            failed=counts["failed_prompts"],
        )
    pairs = math.comb(config.generate.num_samples, 2)
    answered = counts["prompts"] - counts["failed_prompts"]
    if counts["identical_pairs"] == pairs * answered:
        console.warn(
            "identical_answers",
            "All answers to a prompt are the same, so there is nothing to prefer: raise "
            "generate.temperature, or make the server sample",
            identical=counts["identical_pairs"],
        )
    if counts["empty_answers"]:
        console.warn(
            "empty_answers",
            f"{counts['empty_answers']} of {counts['answers']} answers are empty",
            empty=counts["empty_answers"],
        )
