"""Rows of random tokens that are as long as MedQuAD's, for bench/gpu.py.

quantiles of the lengths → answers in a shuffled order, each behind a prompt of the same length →
what medtrain.train.rows makes of rows on disk. Every call gives the same rows.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from medtrain.train.rows import IGNORED, Part

PROMPT_TOKENS = 82
ROW_TOKENS = (
    102, 110, 122, 133, 137, 144, 150, 157, 164, 174, 182, 190, 198, 207, 214, 223, 231, 241, 250,
    258, 268, 279, 290, 300, 312, 328, 341, 355, 367, 379, 393, 409, 424, 443, 470, 505, 547, 591,
    665, 834,
)  # fmt: skip
"""Quantiles of MedQuAD's rows with system prompt, question and answer, 302 tokens on average."""
PAD, FIRST_WORD = 0, 2


def word_tokenizer() -> Any:
    """A tokenizer that trainers ask for control tokens only."""
    words = Tokenizer(models.WordLevel({"<pad>": PAD, "</s>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")


def sft_part(count: int, vocab: int) -> Part:
    """Rows of random tokens with labels on their answers."""
    rows = list(answers(count, vocab))
    lengths = tuple(PROMPT_TOKENS + len(row) for row in rows)
    prompts = list(words(count, vocab))
    return Part(
        Dataset.from_dict({
            "input_ids": [prompt + row for prompt, row in zip(prompts, rows, strict=True)],
            "labels": [[IGNORED] * PROMPT_TOKENS + row for row in rows],
        }),
        tuple(map(str, range(count))), lengths, tuple(map(len, rows)),
    )  # fmt: skip


def dpo_part(count: int, vocab: int) -> Part:
    """Pairs of random tokens; the rejected answer is as long as another row's."""
    both = list(answers(2 * count, vocab))
    chosen, rejected = both[:count], both[count:]
    items = tuple(len(c) + len(r) for c, r in zip(chosen, rejected, strict=True))
    return Part(
        Dataset.from_dict({"prompt_ids": list(words(count, vocab)), "chosen_ids": chosen,
                           "rejected_ids": rejected}),
        tuple(map(str, range(count))), tuple(2 * PROMPT_TOKENS + n for n in items), items,
    )  # fmt: skip


def answers(count: int, vocab: int) -> Iterator[list[int]]:
    """Answers of random tokens, as long as MedQuAD's."""
    drawn = random.Random("answers")
    lengths = [ROW_TOKENS[i % len(ROW_TOKENS)] - PROMPT_TOKENS for i in range(count)]
    drawn.shuffle(lengths)
    for length in lengths:
        yield [drawn.randrange(FIRST_WORD, vocab) for _ in range(length)]


def words(count: int, vocab: int) -> Iterator[list[int]]:
    """Prompts of random tokens."""
    drawn = random.Random("prompts")
    for _ in range(count):
        yield [drawn.randrange(FIRST_WORD, vocab) for _ in range(PROMPT_TOKENS)]
