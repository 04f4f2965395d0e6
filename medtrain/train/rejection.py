"""Rejection sampling: supervised fine-tuning on the answer that the judge liked best.

preferences → of each prompt the answer that nothing is preferred to → token ids with labels on the
answer → the SFT adapter, trained on by TRL's SFTTrainer. That is a round of RAFT (Dong et al. 2023,
https://arxiv.org/abs/2304.06767), with the judge in place of a reward model: rejected answers teach
nothing, so there is neither a reference nor a beta.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from medtrain.config import RunConfig
from medtrain.data.examples import Preference, read_preferences
from medtrain.files import canonical_json
from medtrain.run import Run
from medtrain.train.rows import (
    IGNORED,
    Counts,
    EncodedRow,
    Rows,
    encode_pair,
    refuse_no_pairs,
    split_rows,
)
from medtrain.train.sft import feed_rows
from medtrain.train.trainer_settings import SUPERVISED
from medtrain.train.trainers import SupervisedTrainer
from medtrain.train.training_stage import Method

if TYPE_CHECKING:
    from medtrain.data.chat import ChatTokenizer


def rejection() -> Method:
    """The method."""
    trainer = partial(SupervisedTrainer, stage="dpo")
    return Method(rejection_rows, SUPERVISED, trainer, feed_rows)


def rejection_rows(run: Run, config: RunConfig, chat: ChatTokenizer) -> Rows:
    """`input_ids` and `labels` of the best answers, a row a prompt.

    Raises:
        DataError: there is no answer to train on.
    """
    counts = Counts()
    encoded = _encode(read_preferences(run.preferences), config, chat, counts)
    rows = split_rows(encoded, ("input_ids", "labels"), config.dpo.validation_fraction, counts)
    refuse_no_pairs(run, counts)
    return rows


def best_of(pairs: Sequence[Preference]) -> Preference | None:
    """The pair whose chosen answer is preferred to others, and none to it.

    Of several such answers the one that won most often, then the one that was chosen first.

    Args:
        pairs: all of one prompt.

    Returns:
        The first pair that it won; None where every chosen answer was also rejected.
    """
    wins = Counter(pair.chosen for pair in pairs)
    beaten = {pair.rejected for pair in pairs}
    unbeaten = [pair for pair in pairs if pair.chosen not in beaten]
    return max(unbeaten, key=lambda pair: wins[pair.chosen], default=None)


def _encode(
    preferences: Iterable[Preference], config: RunConfig, chat: ChatTokenizer, counts: Counts
) -> Iterator[EncodedRow]:
    by_prompt: dict[str, list[Preference]] = {}
    for preference in preferences:
        by_prompt.setdefault(canonical_json(list(preference.prompt)), []).append(preference)
    for prompt, pairs in by_prompt.items():
        best = best_of(pairs)
        if best is None:
            counts.unusable_rows += 1
            continue
        # What matters here is whether the chosen answer was cut.
        alone = replace(best, rejected=best.chosen, rejected_cut=best.chosen_cut)
        row = encode_pair(alone, chat, config.dpo.max_length)
        if not row.chosen_ids:
            counts.unusable_rows += 1
            counts.answerless_rows += row.was_cut
            continue
        counts.cut_rows += row.was_cut
        input_ids = row.prompt_ids + row.chosen_ids
        labels = [IGNORED] * len(row.prompt_ids) + row.chosen_ids
        columns = (input_ids, labels)
        yield EncodedRow(prompt, best.id, columns, len(input_ids), len(row.chosen_ids))
