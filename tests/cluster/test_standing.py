"""Which queued jobs can be counted on when something before them is gone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from medtrain.cluster.chain import plan_chain, steps_of
from medtrain.cluster.ledger import Ledger, Submission
from medtrain.cluster.standing import done_steps, doomed, forget_steps, step_mark, was_opened
from medtrain.config import RunConfig, parse_config
from medtrain.console import Console
from medtrain.pipeline import Pipeline
from medtrain.run import Run
from medtrain.stages import STAGES

CHAIN = "one"


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "What is gout?", "answer": "A disease."}\n')
    return parse_config(
        {
            "name": "r",
            "output_dir": str(tmp_path),
            "model": {"base": "builtin:tiny"},
            "data": {"sources": [{"adapter": "table", "path": str(rows)}]},
            "judge": {"kind": "rules"},
        }
    )


@pytest.fixture
def chain(tmp_path: Path, config: RunConfig) -> dict[str, Submission]:
    """A whole chain, submitted."""
    run = Run(tmp_path / "r")
    run.create()
    ledger = Ledger(run)
    for number, job in enumerate(plan_chain(steps_of(STAGES, config), config)):
        intent = ledger.intend(
            job.key, steps=job.steps, after=job.after, tasks=job.tasks, chain=CHAIN
        )
        assert intent is not None
        run.job_folder(job.key, 0).mkdir(parents=True)
        ledger.note(intent, [str(100 + number)], [0])
    return ledger.latest()


def finish(run: Run, submission: Submission) -> None:
    for number in range(len(submission.steps)):
        step_mark(run, submission, number).touch()


def names(submissions: Sequence[Submission]) -> list[str]:
    return [submission.key for submission in submissions]


def test_a_whole_chain_can_be_counted_on(
    tmp_path: Path, config: RunConfig, chain: dict[str, Submission]
) -> None:
    pipeline = Pipeline(Run(tmp_path / "r"), config, Console(quiet=True))
    assert doomed(pipeline, list(chain.values())) == []


def test_behind_a_cancelled_job_everything_is_lost(
    tmp_path: Path, config: RunConfig, chain: dict[str, Submission]
) -> None:
    """Also the job behind an array, which begins when the array is cancelled."""
    pipeline = Pipeline(Run(tmp_path / "r"), config, Console(quiet=True))
    alive = [s for s in chain.values() if s.key != "judge.verdicts.close"]
    lost = names(doomed(pipeline, alive))
    keys = [job.key for job in plan_chain(steps_of(STAGES, config), config)]
    assert sorted(lost) == sorted(keys[keys.index("judge.verdicts.close") + 1 :])


def test_a_job_behind_an_array_that_could_begin_repairs_it(
    tmp_path: Path, config: RunConfig, chain: dict[str, Submission]
) -> None:
    run = Run(tmp_path / "r")
    pipeline = Pipeline(run, config, Console(quiet=True))
    finish(run, chain["merge-sft"])
    before = ("prepare", "sft", "merge-sft", "generate.candidates")
    assert doomed(pipeline, [s for s in chain.values() if s.key not in before]) == []


def test_only_what_the_same_chain_did_counts(tmp_path: Path, chain: dict[str, Submission]) -> None:
    """An older chain's work may have been undone by another configuration since."""
    run, closing = Run(tmp_path / "r"), ("close", "generate", "candidates")
    collecting = chain["generate.candidates.close"]
    assert not was_opened(run, collecting, closing)
    assert done_steps(run, CHAIN) == set()
    finish(run, chain["merge-sft"])
    assert was_opened(run, collecting, closing)
    opened = {("run", "merge-sft", ""), ("open", "generate", "candidates")}
    assert done_steps(run, CHAIN) == opened
    assert done_steps(run, "a later one") == set()
    assert not was_opened(run, replace(collecting, chain="a later one"), closing)
    finish(run, collecting)
    assert ("shards", "generate", "candidates") in done_steps(run, CHAIN)
    forget_steps(run, "generate")
    assert done_steps(run, CHAIN) == {("run", "merge-sft", ""), ("open", "judge", "verdicts")}
