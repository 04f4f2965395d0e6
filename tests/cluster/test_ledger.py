"""The ledger: one of two submitters wins, and what it says is what was written or an error."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medtrain.cluster.ledger import Ledger, Submission
from medtrain.errors import DataError
from medtrain.run import Run

KEYS = st.from_regex(r"[a-z]{1,6}([.-][a-z]{1,6}){0,2}", fullmatch=True)
UNITS = st.tuples(st.sampled_from(["candidates", "answers.base", "loss.ß"]), st.integers(0, 2000))
TASKS = st.lists(st.lists(UNITS, min_size=1, max_size=3).map(tuple), max_size=8).map(tuple)
STEPS = st.lists(
    st.tuples(st.sampled_from(["open", "run", "shards", "close"]), KEYS, KEYS), min_size=1
).map(tuple)
AFTER = st.lists(st.tuples(KEYS, st.sampled_from(["afterok", "afterany"]))).map(tuple)


def ledger_in(root: Path) -> Ledger:
    root.mkdir(parents=True, exist_ok=True)
    return Ledger(Run(root))


def intended(ledger: Ledger, key: str = "sft", tasks: int = 0) -> Submission:
    intent = ledger.intend(
        key, steps=[("train", "sft", "")], tasks=[[("answers", shard)] for shard in range(tasks)]
    )
    assert intent is not None
    return intent


@given(key=KEYS, steps=STEPS, after=AFTER, tasks=TASKS, gpus=st.integers(0, 64), ids=st.data())
def test_what_is_read_is_what_was_written(
    tmp_path_factory: pytest.TempPathFactory,
    key: str,
    steps: tuple[tuple[str, str, str], ...],
    after: tuple[tuple[str, str], ...],
    tasks: tuple[tuple[tuple[str, int], ...], ...],
    gpus: int,
    ids: st.DataObject,
) -> None:
    ledger = ledger_in(tmp_path_factory.mktemp("ledger"))
    intent = ledger.intend(key, steps=steps, after=after, tasks=tasks, gpus=gpus)  # type: ignore[arg-type]
    assert intent is not None
    assert ledger.all() == [intent] == [ledger.one(key, 0)]
    assert (intent.steps, intent.after, intent.tasks) == (steps, after, tasks)
    starts = ids.draw(st.lists(st.integers(0, 9), unique=True).map(sorted))
    noted = ledger.note(intent, [str(100 + i) for i in range(len(starts))], starts)
    assert ledger.latest() == {key: noted}
    assert noted.starts == tuple(starts)


def submit_together(run: Run, together: threading.Barrier, won: list[Submission | None]) -> None:
    mine = Ledger(run)

    def seen_by_all() -> list[Submission]:
        seen = Ledger(run).all()
        together.wait()
        return seen

    mine.all = seen_by_all  # type: ignore[method-assign]
    won.append(mine.intend("sft", steps=[("train", "sft", "")]))


def test_of_two_submitters_one_wins(tmp_path: Path) -> None:
    """Every round, eight threads that have all seen the same ledger want to submit one key."""
    for round_ in range(10):
        ledger = ledger_in(tmp_path / str(round_))
        together = threading.Barrier(8)
        won: list[Submission | None] = []

        threads = [
            threading.Thread(target=submit_together, args=(ledger.run, together, won))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        winners = [intent for intent in won if intent is not None]
        assert len(won) == 8
        assert ledger.all() == winners
        assert len(winners) == 1


def test_each_submission_of_a_key_has_its_own_number(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path)
    first, other, second = (intended(ledger, key) for key in ("sft", "merge-sft", "sft"))
    assert (first.number, other.number, second.number) == (0, 0, 1)
    assert ledger.latest() == {"sft": second, "merge-sft": other}
    assert len({s.nonce for s in ledger.all()}) == 3
    assert [s.comment for s in ledger.all()] == [f"medtrain:{s.nonce}" for s in ledger.all()]


def test_the_first_note_of_job_ids_stands(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path)
    intent = intended(ledger)
    assert not ledger.was_noted(intent)
    assert ledger.note(intent, ["17"], [0]).job_ids == ("17",)
    assert ledger.note(intent, ["18"], [0]).job_ids == ("17",)
    ledger.give_up(intent)
    assert ledger.all()[0].job_ids == ("17",)


def test_given_up_is_noted_without_ids(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path)
    intent = intended(ledger)
    ledger.give_up(intent)
    assert ledger.was_noted(intent)
    assert ledger.one("sft", 0).job_ids == ()


@given(position=st.floats(0, 0.999), flip=st.integers(1, 255), note=st.booleans())
def test_a_flipped_byte_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, position: float, flip: int, note: bool
) -> None:
    ledger = ledger_in(tmp_path_factory.mktemp("ledger"))
    ledger.note(intended(ledger), ["17"], [0])
    damaged = ledger.run.submissions / ("sft.000.job.json" if note else "sft.000.json")
    content = bytearray(damaged.read_bytes())
    content[int(position * (len(content) - 1))] ^= flip  # the line's end says nothing
    damaged.write_bytes(content)
    with pytest.raises(DataError, match=re.escape(str(damaged))):
        ledger.all()


def test_notes_of_another_intent_are_refused(tmp_path: Path) -> None:
    ours, theirs = ledger_in(tmp_path / "a"), ledger_in(tmp_path / "b")
    intended(ours)
    theirs.note(intended(theirs), ["17"], [0])
    note = "sft.000.job.json"
    (ours.run.submissions / note).write_bytes((theirs.run.submissions / note).read_bytes())
    with pytest.raises(DataError, match="belong together"):
        ours.all()


def test_other_files_are_not_submissions(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path)
    assert ledger.all() == []
    intent = intended(ledger)
    for name in (".tmp-sft.001.json-abc", "notes.txt", "sft.json"):
        (ledger.run.submissions / name).write_text("half")
    # What publishing leaves on a file system without hard links.
    (ledger.run.submissions / ".claim-sft.000.json").mkdir()
    assert ledger.all() == [intent]


def test_which_task_an_array_element_is(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path)
    array = ledger.note(intended(ledger, "generate.candidates", tasks=7), ["50", "51"], [0, 4])
    assert [array.task_of("50", 3), array.task_of("51", 0), array.task_of("51", 2)] == [3, 4, 6]
    assert array.task_of("51", 3) is None
    assert array.task_of("52", 0) is None
