"""From rows on disk to the token ids that the trainers take.

examples or preferences → token ids and labels (ChatTokenizer) → rows beyond `max_length` cut, rows
without a token to learn from left out, both counted → a training and a validation part, told apart
by a hash of the row, so that the same row is always on the same side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from datasets import Dataset, Features, Value
from datasets import Sequence as ListOf

from medtrain.config import RunConfig
from medtrain.console import Console
from medtrain.data.examples import Example, Preference, read_examples, read_preferences
from medtrain.errors import DataError
from medtrain.files import canonical_json
from medtrain.run import Run

if TYPE_CHECKING:
    from medtrain.data.chat import ChatTokenizer

IGNORED = -100
"""The label of a token without loss."""
PAIR_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
"""Of a dataset of preference pairs."""
_ROWS_AT_A_TIME = 2_000


@dataclass
class Counts:
    """What became of the rows."""

    train_rows: int = 0
    validation_rows: int = 0
    cut_rows: int = 0
    """Longer than `max_length`: the end was cut off."""
    unusable_rows: int = 0
    """Without a token to learn from inside `max_length`, or a pair of equal answers, or one whose
    prompt has no answer that is preferred to all others."""
    answerless_rows: int = 0
    """Those of the unusable whose prompt alone takes up `max_length`."""

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class Part:
    """The training or the validation rows."""

    dataset: Any
    """A datasets.Dataset of token ids."""
    ids: tuple[str, ...]
    """Of the rows, as in the file that they came from."""
    lengths: tuple[int, ...]
    """Tokens that a forward pass of the row computes; of a pair, those of both sides."""
    items: tuple[int, ...]
    """Tokens with a loss."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Rows:
    """Token ids, ready for a trainer."""

    train: Part
    validation: Part | None
    """None without validation rows."""
    counts: Counts


class EncodedRow(NamedTuple):
    """A row on its way from a file into a part."""

    key: str
    """Decides its side."""
    id: str
    columns: tuple[list[int], ...]
    length: int
    items: int


def sft_rows(run: Run, config: RunConfig, chat: ChatTokenizer) -> Rows:
    """`input_ids` and `labels` of the training rows.

    Raises:
        DataError: there is no row to train on.
    """
    counts = Counts()
    encoded = _encode_examples(read_examples(run.train_rows), config, chat, counts)
    rows = split_rows(encoded, ("input_ids", "labels"), config.sft.validation_fraction, counts)
    if not counts.train_rows:
        raise DataError(
            f"{run.train_rows} has no row to train on"
            + (f": {counts.unusable_rows} rows end before their answer" if counts.unusable_rows
               else ""),
            fix="Raise sft.max_length, or look at data/card.json for why rows were left out.",
        )  # fmt: skip
    return rows


def dpo_rows(run: Run, config: RunConfig, chat: ChatTokenizer) -> Rows:
    """`prompt_ids`, `chosen_ids` and `rejected_ids` of the preference rows.

    Raises:
        DataError: there is no pair to train on.
    """
    counts = Counts()
    encoded = encode_preferences(read_preferences(run.preferences), config, chat, counts)
    rows = split_rows(encoded, PAIR_COLUMNS, config.dpo.validation_fraction, counts)
    refuse_no_pairs(run, counts)
    return rows


def refuse_no_pairs(run: Run, counts: Counts) -> None:
    """Say clearly that the preferences hold nothing to train on.

    Raises:
        DataError: there is no row.
    """
    if not counts.train_rows:
        raise DataError(
            f"{run.preferences} has no preference pair to train on"
            + (f": {counts.unusable_rows} are longer than dpo.max_length" if counts.unusable_rows
               else ""),
            fix="All pairs were ties, conflicts or failures (pairs/dropped.jsonl says which): use "
            "more prompts (data.preference_fraction), more samples (generate.num_samples), a "
            "higher generate.temperature, or another judge.",
        )  # fmt: skip


def tell_counts(counts: Counts, stage: str, console: Console) -> None:
    """Say how many rows there are, and warn of those that lost something."""
    console.event(
        "rows",
        f"{stage}: {counts.train_rows:,} rows to train on, {counts.validation_rows:,} to validate",
        stage=stage,
        **counts.to_json(),
    )
    if counts.cut_rows or counts.unusable_rows:
        console.warn(
            "rows_cut",
            f"{stage}: {counts.cut_rows:,} rows were cut at {stage}.max_length, and "
            f"{counts.unusable_rows:,} left out because nothing to learn from was left of them",
            stage=stage,
        )


def is_validation(key: str, fraction: float) -> bool:
    """Whether the row of this key is on the validation side; the same answer every time."""
    digest = hashlib.sha256(f"validation:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _encode_examples(
    examples: Iterator[Example], config: RunConfig, chat: ChatTokenizer, counts: Counts
) -> Iterator[EncodedRow]:
    longest = config.sft.max_length
    while batch := list(islice(examples, _ROWS_AT_A_TIME)):
        encoded = chat.encode_many([list(e.messages) for e in batch], config.sft.loss_on)
        for example, row in zip(batch, encoded, strict=True):
            counts.cut_rows += len(row.input_ids) > longest
            ids = row.input_ids[:longest]
            labels = [
                token if learnt else IGNORED
                for token, learnt in zip(ids, row.loss_mask, strict=False)
            ]
            # The first token of a row is predicted from nothing, so its label does not count.
            supervised = sum(label != IGNORED for label in labels[1:])
            if not supervised:
                counts.unusable_rows += 1
            else:
                # By question: another answer to it on the other side would flatter the validation.
                yield EncodedRow(example.question, example.id, (ids, labels), len(ids), supervised)


def encode_preferences(
    preferences: Iterable[Preference], config: RunConfig, chat: ChatTokenizer, counts: Counts
) -> Iterator[EncodedRow]:
    """The usable pairs, with columns as `PAIR_COLUMNS` has them; the others are counted."""
    for preference in preferences:
        pair = encode_pair(preference, chat, config.dpo.max_length)
        if not pair.is_usable:
            counts.unusable_rows += 1
            counts.answerless_rows += not (pair.chosen_ids or pair.rejected_ids)
            continue
        counts.cut_rows += pair.was_cut
        # Pairs of one prompt stay together: a prompt on both sides would flatter the validation.
        key = canonical_json(list(preference.prompt))
        columns = (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
        answers = len(pair.chosen_ids) + len(pair.rejected_ids)
        yield EncodedRow(key, preference.id, columns, 2 * len(pair.prompt_ids) + answers, answers)


class EncodedPair(NamedTuple):
    """A preference pair as DPO sees it."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    was_cut: bool
    """Whether an answer lost its end."""

    @property
    def is_usable(self) -> bool:
        """Whether anything can be learnt from it: its answers are there, and differ."""
        return bool(self.chosen_ids and self.rejected_ids) and self.chosen_ids != self.rejected_ids


def encode_pair(pair: Preference, chat: ChatTokenizer, max_length: int) -> EncodedPair:
    """The token ids of a pair, its answers cut where a row would be longer than `max_length`.

    An answer that ran into the token limit does not end there: it gets no end token, lest the model
    learn to stop in the middle of a sentence.
    """
    row = chat.encode_preference(list(pair.prompt), pair.chosen, pair.rejected)
    room = max(0, max_length - len(row.prompt_ids))
    chosen = row.chosen_ids[:-1] if pair.chosen_cut else row.chosen_ids
    rejected = row.rejected_ids[:-1] if pair.rejected_cut else row.rejected_ids
    was_cut = max(len(chosen), len(rejected)) > room
    return EncodedPair(row.prompt_ids, chosen[:room], rejected[:room], was_cut)


def split_rows(
    rows: Iterable[EncodedRow], columns: Sequence[str], fraction: float, counts: Counts
) -> Rows:
    """Tell training and validation rows apart, and count them.

    Args:
        rows: with as many columns as `columns` names.
        columns: of the dataset.
        fraction: share of the rows to validate on; of so few that none is left to train on, none.
        counts: gets the numbers of both.
    """
    train: list[EncodedRow] = []
    validation: list[EncodedRow] = []
    for row in rows:
        (validation if is_validation(row.key, fraction) else train).append(row)
    if not train:
        train, validation = validation, []
    counts.train_rows, counts.validation_rows = len(train), len(validation)
    return Rows(_part(train, columns), _part(validation, columns) if validation else None, counts)


def _part(rows: Sequence[EncodedRow], columns: Sequence[str]) -> Part:
    features = Features({name: ListOf(Value("int32")) for name in columns})
    data = {name: [row.columns[i] for row in rows] for i, name in enumerate(columns)}
    return Part(
        Dataset.from_dict(data, features=features),
        ids=tuple(row.id for row in rows),
        lengths=tuple(row.length for row in rows),
        items=tuple(row.items for row in rows),
    )
