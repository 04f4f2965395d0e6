from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from medtrain.console import Console
from medtrain.errors import DataError, MedtrainError
from medtrain.files import read_jsonl, write_json
from medtrain.generate import batches, transformers_engine
from medtrain.generate.stage import generate
from medtrain.run import Run
from tests.generate.endpoint import echo, fails, serving
from tests.generate.models import config_for, write_run

PROMPTS = 14


@pytest.fixture(scope="module")
def pristine(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("pristine") / "small", base_dir, PROMPTS).root


@pytest.fixture(scope="module")
def undisturbed(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The candidates of one shard, computed in one go."""
    run = copy_of(pristine, tmp_path_factory.mktemp("undisturbed"))
    do(run)
    return run.candidates.read_bytes()


def copy_of(pristine: Path, directory: Path) -> Run:
    shutil.copytree(pristine, directory / "small")
    return Run(directory / "small")


def do(run: Run, **settings: Any) -> dict[str, Any]:
    return generate(run, config_for(run.root.parent, **settings), Console(quiet=True))


def test_every_prompt_gets_its_candidates_in_order(undisturbed: bytes) -> None:
    rows = [json.loads(line) for line in undisturbed.splitlines()]
    assert [row["id"] for row in rows] == [f"{i:016x}" for i in range(PROMPTS)]
    for row in rows:
        assert set(row) == {"id", "candidates", "tokens"}
        assert [c["index"] for c in row["candidates"]] == [0, 1]
        for candidate in row["candidates"]:
            assert set(candidate) == {"index", "text", "tokens", "finish"}
            assert candidate["tokens"] <= 10
            assert candidate["finish"] in {"stop", "length"}


@pytest.mark.parametrize("num_shards", [3, 7])
def test_the_number_of_shards_changes_no_byte(
    pristine: Path, tmp_path: Path, undisturbed: bytes, num_shards: int
) -> None:
    run = copy_of(pristine, tmp_path)
    do(run, num_shards=num_shards)
    assert run.candidates.read_bytes() == undisturbed


@pytest.mark.parametrize("num_shards", [1, 3])
def test_slots_change_no_byte_either(
    pristine: Path,
    tmp_path: Path,
    undisturbed: bytes,
    monkeypatch: pytest.MonkeyPatch,
    num_shards: int,
) -> None:
    in_slots = partial(transformers_engine.choose_decoder, way="slots")  # type: ignore[attr-defined]

    def chosen(*arguments: Any, prompts: Any, in_all: int, way: str) -> Any:
        assert (prompts, way) == ("auto", "auto")
        assert in_all == len(undisturbed.splitlines())
        return in_slots(*arguments, prompts=3)

    monkeypatch.setattr(transformers_engine, "choose_decoder", chosen)
    run = copy_of(pristine, tmp_path)
    do(run, num_shards=num_shards, batch_size="auto")
    assert run.candidates.read_bytes() == undisturbed


def test_batch_size_does_not_change_an_answer(
    pristine: Path, tmp_path: Path, undisturbed: bytes
) -> None:
    run = copy_of(pristine, tmp_path)
    do(run, batch_size=5)
    assert run.candidates.read_bytes() == undisturbed


def test_an_error_midway_loses_nothing_that_was_finished(
    pristine: Path, tmp_path: Path, undisturbed: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy_of(pristine, tmp_path)
    calls: list[int] = []
    decode = batches.decode  # type: ignore[attr-defined]

    def counted(model: Any, prompts: Any, *rest: Any) -> None:
        calls.append(len(prompts))
        if len(calls) == 3:
            raise OSError("disk full")
        decode(model, prompts, *rest)

    monkeypatch.setattr(batches, "decode", counted)
    with pytest.raises(OSError, match="disk full"):
        do(run)
    do(run)
    assert run.candidates.read_bytes() == undisturbed
    assert calls == [4, 4, 4, 4, 2], "two batches before the fault, the other two after it"


KILLED = """
import os, signal, sys
from pathlib import Path
from medtrain.console import Console
from medtrain.generate import stage, batches
from medtrain.run import Run
from tests.generate.models import config_for

decode, calls = batches.decode, []

def dying(*arguments):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    decode(*arguments)

batches.decode = dying
root = Path(sys.argv[1])
stage.generate(Run(root), config_for(root.parent), Console(quiet=True))
"""


def test_killed_midway_and_started_again_it_ends_with_the_same_bytes(
    pristine: Path, tmp_path: Path, undisturbed: bytes
) -> None:
    run = copy_of(pristine, tmp_path)
    died = subprocess.run(
        [sys.executable, "-c", KILLED, str(run.root)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=False,
        timeout=300,
    )
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    assert not run.candidates.exists()
    do(run, num_shards=3)
    assert run.candidates.read_bytes() == undisturbed


def test_a_finished_stage_loads_no_model(
    pristine: Path, tmp_path: Path, undisturbed: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy_of(pristine, tmp_path)
    before = do(run)
    monkeypatch.setattr(batches, "decode", None)
    assert do(run) == before
    assert run.candidates.read_bytes() == undisturbed


@pytest.mark.parametrize("changed", [{"temperature": 0.5}, {"top_k": 7}, {"max_new_tokens": 9}])
def test_other_sampling_gives_other_answers(
    pristine: Path, tmp_path: Path, undisturbed: bytes, changed: dict[str, Any]
) -> None:
    run = copy_of(pristine, tmp_path)
    do(run)
    do(run, **changed)
    assert run.candidates.read_bytes() != undisturbed


def test_another_model_gives_other_answers(
    pristine: Path, tmp_path: Path, undisturbed: bytes
) -> None:
    run = copy_of(pristine, tmp_path)
    do(run)
    write_json(run.merged("sft") / "medtrain_merge.json", {"digest": "another"})
    plan = (run.generate / "plan.json").read_bytes()
    do(run)
    assert (run.generate / "plan.json").read_bytes() != plan


def test_counts_are_those_of_the_file(pristine: Path, tmp_path: Path) -> None:
    run = copy_of(pristine, tmp_path)
    counts = do(run)
    candidates = [c for row in read_jsonl(run.candidates) for c in row["candidates"]]
    assert counts["prompts"] == PROMPTS
    assert counts["answers"] == len(candidates) == 2 * PROMPTS
    assert counts["mean_tokens"] == pytest.approx(
        sum(c["tokens"] for c in candidates) / len(candidates), abs=0.01
    )
    stopped = sum(c["finish"] == "stop" for c in candidates)
    assert counts["stopped_share"] == pytest.approx(stopped / len(candidates), abs=1e-4)
    assert (counts["failed_prompts"], counts["identical_pairs"]) == (0, 0)
    json.dumps(counts)


def test_nothing_but_identical_pairs_is_said(
    pristine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(pristine, tmp_path)
    counts = generate(run, config_for(tmp_path, temperature=0.0), Console())
    assert counts["identical_pairs"] == PROMPTS
    assert "nothing to prefer" in capsys.readouterr().out


def test_without_prompts_the_file_is_empty_and_said_to_be(
    pristine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(pristine, tmp_path)
    run.preference_prompts.write_text("")
    shutil.rmtree(run.merged("sft"))
    counts = generate(run, config_for(tmp_path), Console())
    assert run.candidates.read_bytes() == b""
    assert counts["prompts"] == 0
    assert counts["mean_tokens"] is None
    assert "No preference prompts" in capsys.readouterr().out


def test_without_the_sft_model_the_message_says_what_to_run(pristine: Path, tmp_path: Path) -> None:
    run = copy_of(pristine, tmp_path)
    shutil.rmtree(run.merged("sft"))
    with pytest.raises(DataError, match="merged SFT model"):
        do(run)


def test_an_endpoint_answers_the_prompts_too(pristine: Path, tmp_path: Path) -> None:
    run = copy_of(pristine, tmp_path)

    def some(body: dict[str, Any], asked_before: int) -> Any:
        bad = "(3)" in body["messages"][-1]["content"]
        return fails(400, "too long") if bad else echo(body, asked_before)

    with serving(some, models=["sft"]) as server:
        counts = do(run, engine="openai", base_url=server.url)
        asked = len(server.requests)
        do(run, engine="openai", base_url=server.url)
        assert len(server.requests) == asked + 1, "only the failed prompt is asked again"
    assert (counts["prompts"], counts["failed_prompts"]) == (PROMPTS, 1)
    rows = list(read_jsonl(run.candidates))
    assert "too long" in rows[3]["error"]
    assert "candidates" not in rows[3]


def test_no_answer_at_all_is_an_error(pristine: Path, tmp_path: Path) -> None:
    run = copy_of(pristine, tmp_path)
    with (
        serving(lambda body, n: fails(400, "no"), models=["sft"]) as server,
        pytest.raises(MedtrainError, match="Not one of 14 prompts"),
    ):
        do(run, engine="openai", base_url=server.url)


def test_the_log_holds_no_text_of_a_row(pristine: Path, tmp_path: Path) -> None:
    run = copy_of(pristine, tmp_path)
    run.logs.mkdir(exist_ok=True)
    console = Console(run.log, quiet=True)
    generate(run, config_for(tmp_path, temperature=0.0), console)
    console.event("end")
    assert "asthma" not in run.log.read_text()
