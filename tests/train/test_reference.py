"""The reference's log-probabilities: right to the last digits, computed once, and found again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medtrain.cluster.chain import steps_of
from medtrain.config import RunConfig, load_config
from medtrain.data.examples import read_preferences
from medtrain.data.tokenizer import prepare_tokenizer
from medtrain.errors import DataError, MedtrainError
from medtrain.files import read_jsonl, write_jsonl
from medtrain.lineage import Fingerprint
from medtrain.pipeline import Pipeline
from medtrain.run import Run
from medtrain.stages import STAGES, by_name, needed_before, stages_of
from medtrain.status import run_status
from medtrain.train import log_probs, reference
from medtrain.train.adapter import attach_adapter
from medtrain.train.model import load_base
from medtrain.train.reference import compute_reference, read_reference
from medtrain.train.rows import dpo_rows, encode_pair
from tests.train.conftest import MakeRun, Ready, make_ready
from tests.train.test_model import other_base, trained_adapter

_ROOT = Path(__file__).resolve().parents[2]
_BATCH = 5


@pytest.fixture(scope="module")
def pristine(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Ready:
    """A run whose SFT adapter is far from doing nothing."""
    ready = make_ready(tmp_path_factory.mktemp("pristine") / "run", base_dir)
    trained_adapter(ready, ready.run.adapter("sft"))
    return ready


@pytest.fixture
def copied(pristine: Ready, tmp_path: Path) -> Callable[..., Ready]:
    """Copies of it, under a configuration that is changed in places."""

    def make(*overrides: str, name: str = "copy") -> Ready:
        root = tmp_path / name
        shutil.copytree(pristine.run.root, root)
        return Ready(Run(root), load_config(root, list(overrides)), pristine.console)

    return make


@pytest.fixture(scope="module")
def undisturbed(pristine: Ready, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The lines of one shard, computed in one go, in batches as small as the tests have them."""
    root = tmp_path_factory.mktemp("undisturbed") / "run"
    shutil.copytree(pristine.run.root, root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "BATCH_PAIRS", _BATCH)
        compute_reference(Run(root), pristine.config, pristine.console)
    return Run(root).reference.read_bytes()


def compute(ready: Ready) -> dict[str, Any]:
    return compute_reference(ready.run, ready.config, ready.console)


def lines_of(ready: Ready) -> dict[str, dict[str, Any]]:
    return {line["id"]: line for line in read_jsonl(ready.run.reference)}


def plain_sums(ready: Ready) -> dict[str, tuple[float, float]]:
    """The same from the logits of whole rows, one row at a time."""
    nf4 = ready.config.model.quantization == "nf4"
    base = load_base(ready.run, ready.config, ready.chat, quantized=nf4)
    model = attach_adapter(base, ready.run.adapter("sft"))

    def plain(prompt: list[int], answer: list[int]) -> float:
        ids = torch.tensor([[*prompt, *answer]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt) - 1 : -1].double()  # (answer, vocab)
        return float(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum())

    found = {}
    for preference in read_preferences(ready.run.preferences):
        pair = encode_pair(preference, ready.chat, ready.config.dpo.max_length)
        if pair.is_usable:
            answers = (pair.chosen_ids, pair.rejected_ids)
            chosen, rejected = (plain(pair.prompt_ids, answer) for answer in answers)
            found[preference.id] = (chosen, rejected)
    return found


def same(found: dict[str, tuple[float, float]], expected: dict[str, tuple[float, float]]) -> None:
    """Equal up to the rounding of float32 sums over some thirty tokens."""
    assert found.keys() == expected.keys()
    for row_id, sums in expected.items():
        assert found[row_id] == pytest.approx(sums, rel=2e-5), row_id
        assert max(sums) < -1, "an answer that is not certain"


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_the_sums_are_those_of_plain_logits(
    make_run: MakeRun, base_dir: Path, tmp_path: Path, tied: bool, quantization: str, packing: bool
) -> None:
    base = base_dir if tied else other_base(base_dir, tmp_path / "b", tie_word_embeddings=False)
    model = {"quantization": quantization, "base": str(base), "system_prompt": None}
    ready = make_run(base=base, rows=12, model=model, dpo={"packing": packing})
    trained_adapter(ready, ready.run.adapter("sft"))
    counts = compute(ready)
    same(read_reference(ready.run, ready.config), plain_sums(ready))
    assert (counts["pairs"], counts["left_out"]) == (12, 0)


def test_bfloat16_is_computed_as_training_does(copied: Callable[..., Ready]) -> None:
    """Autocast keeps eight bits of what it multiplies; sums are float32."""
    whole, half = copied(name="whole"), copied("model.dtype=bfloat16", name="half")
    compute(whole)
    compute(half)
    exact, rounded = (read_reference(ready.run, ready.config) for ready in (whole, half))
    assert exact != rounded
    for row_id, sums in exact.items():
        assert rounded[row_id] == pytest.approx(sums, rel=0.05)


def test_rows_are_cut_as_training_cuts_them(copied: Callable[..., Ready]) -> None:
    ready = copied()
    pairs = [dict(row) for row in read_jsonl(ready.run.preferences)]
    pairs[0]["prompt"] = [{"role": "user", "content": "long " * 200}]
    pairs[1]["chosen"] = "long " * 200
    pairs[2]["chosen"] = pairs[2]["rejected"]
    pairs[3]["chosen_cut"] = pairs[4]["rejected_cut"] = True
    pairs[5] = {**pairs[5], "rejected": "", "rejected_cut": True}
    write_jsonl(ready.run.preferences, pairs)
    counts = compute(ready)
    lines = lines_of(ready)
    assert list(lines) == [pair["id"] for pair in pairs], "a line a pair, in order"

    rows = dpo_rows(ready.run, ready.config, ready.chat)
    assert rows.validation is not None
    learnt = {
        row_id: (len(row["chosen_ids"]), len(row["rejected_ids"]))
        for part in (rows.train, rows.validation)
        for row_id, row in zip(part.ids, part.dataset, strict=True)
    }
    kept = {row_id: line for row_id, line in lines.items() if line["chosen"] is not None}
    tokens = {i: (line["chosen_tokens"], line["rejected_tokens"]) for i, line in kept.items()}
    assert tokens == learnt
    assert set(lines) - set(kept) == {pairs[i]["id"] for i in (0, 2, 5)}
    assert counts["left_out"] == rows.counts.unusable_rows == 3
    same(read_reference(ready.run, ready.config), plain_sums(ready))


# Shards


@pytest.mark.parametrize("num_shards", [3, 7])
def test_the_number_of_shards_changes_no_byte(
    copied: Callable[..., Ready],
    undisturbed: bytes,
    num_shards: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reference, "BATCH_PAIRS", _BATCH)
    ready = copied(f"dpo.reference_shards={num_shards}")
    compute(ready)
    assert len(list((ready.run.reference_shards / "shards").iterdir())) == num_shards
    assert ready.run.reference.read_bytes() == undisturbed


_KILLED = """
import os, signal, sys
from pathlib import Path
from medtrain.config import load_config
from medtrain.console import Console
from medtrain.run import Run
from medtrain.train import log_probs, reference

reference.BATCH_PAIRS = int(sys.argv[2])
sums, calls = log_probs.AnswerScorer.sums, []

def dying(self, rows):
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return sums(self, rows)

log_probs.AnswerScorer.sums = dying
root = Path(sys.argv[1])
reference.compute_reference(Run(root), load_config(root), Console(quiet=True))
"""


def test_killed_midway_and_started_again_it_ends_with_the_same_bytes(
    copied: Callable[..., Ready], undisturbed: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = copied("dpo.reference_shards=3")
    died = subprocess.run(
        [sys.executable, "-c", _KILLED, str(ready.run.root), str(_BATCH)],
        cwd=_ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=False,
        timeout=300,
    )
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    assert not ready.run.reference.exists()
    monkeypatch.setattr(reference, "BATCH_PAIRS", _BATCH)
    read = counted(monkeypatch)
    compute(ready)
    assert ready.run.reference.read_bytes() == undisturbed
    assert len(read) == 48 - 3 * _BATCH, "three batches were finished before"


@given(st.lists(st.integers(1, 20_000), max_size=40), st.booleans())
def test_a_pass_holds_a_bounded_number_of_tokens(lengths: list[int], padded: bool) -> None:
    def tokens(rows: list[int]) -> int:
        return len(rows) * max(rows) if padded else sum(rows)

    found = list(log_probs.passes(lengths, padded=padded))
    assert sorted(place for places in found for place in places) == list(range(len(lengths)))
    taken = [[lengths[place] for place in places] for places in found]
    assert all(tokens(rows) <= log_probs.TOKENS_A_PASS or len(rows) == 1 for rows in taken)
    for rows, after in pairwise(taken):
        assert tokens([*rows, min(after)]) > log_probs.TOKENS_A_PASS, "no pass is cut too early"


# Computed once


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pairs that a model reads from now on."""
    read: list[int] = []
    sums = log_probs.AnswerScorer.sums

    def counting(self: log_probs.AnswerScorer, rows: Any) -> list[float]:
        read.extend(range(len(rows) // 2))
        return sums(self, rows)

    monkeypatch.setattr(log_probs.AnswerScorer, "sums", counting)
    return read


def record(ready: Ready) -> None:
    """Receipts of what stands in for the stages before."""
    made = {"prepare": [ready.run.data], "sft": [ready.run.adapter("sft")],
            "pairs": [ready.run.preferences]}  # fmt: skip
    lineage = Pipeline(ready.run, ready.config, ready.console).lineage
    for stage, outputs in made.items():
        lineage.finish(stage, Fingerprint({}, {}), outputs, {}, 1.0, "now")


def bring(ready: Ready, *overrides: str) -> str:
    """Run the stage under a configuration; what it was before."""
    config = load_config(ready.run.root, list(overrides))
    pipeline, stage = Pipeline(ready.run, config, ready.console), by_name("reference")
    before = pipeline.standing(stage).state
    pipeline.bring(stage)
    return before


def test_dpo_again_with_other_settings_reads_no_pair_again(
    copied: Callable[..., Ready], monkeypatch: pytest.MonkeyPatch
) -> None:
    ready, read = copied(), counted(monkeypatch)
    record(ready)
    assert bring(ready) == "missing"
    assert len(read) == 48
    for other in ("dpo.beta=0.5", "dpo.learning_rate=1e-5", "dpo.loss_type=ipo", "dpo.epochs=3",
                  "dpo.batch_size=1", "dpo.validation_fraction=0.3", "seed=9",
                  "dpo.reference_shards=4", "sft.learning_rate=0.1"):  # fmt: skip
        assert bring(ready, other) == "done", other
    assert len(read) == 48


def another_adapter(ready: Ready) -> None:
    trained_adapter(ready, ready.run.adapter("sft"), alpha=4)


def another_pair(ready: Ready) -> None:
    rows = [dict(row) for row in read_jsonl(ready.run.preferences)]
    rows[0]["chosen"] += " Take care."
    write_jsonl(ready.run.preferences, rows)


def another_template(ready: Ready) -> None:
    """The tokens of the new one are rows that the adapter trains."""
    config = load_config(ready.run.root, ["model.chat_template=zephyr"])
    prepare_tokenizer(ready.run, config)
    trained_adapter(ready._replace(config=config), ready.run.adapter("sft"))


@pytest.mark.parametrize(
    ("change", "overrides"),
    [
        (another_adapter, []),
        (another_pair, []),
        (another_template, ["model.chat_template=zephyr"]),
        (lambda ready: None, ["dpo.max_length=30"]),
        (lambda ready: None, ["model.quantization=none"]),
    ],
    ids=["adapter", "preferences", "template", "max_length", "quantization"],
)
def test_what_changes_a_sum_has_it_computed_again(
    copied: Callable[..., Ready],
    change: Callable[[Ready], None],
    overrides: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ready = copied()
    record(ready)
    bring(ready)
    before = ready.run.reference.read_bytes()
    read = counted(monkeypatch)
    change(ready)
    record(ready)
    assert bring(ready, *overrides) == "stale"
    assert len(read) == 48
    assert ready.run.reference.read_bytes() != before


# Methods without a reference


@pytest.mark.parametrize("method", ["orpo", "rejection"])
def test_a_method_without_a_reference_has_no_such_stage(
    copied: Callable[..., Ready], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready, read = copied(f"dpo.method={method}"), counted(monkeypatch)
    record(ready)
    assert bring(ready, f"dpo.method={method}") == "done"
    assert not read
    assert not ready.run.reference.exists()
    assert read_reference(ready.run, ready.config) == {}
    assert "reference" not in [stage.name for stage in stages_of(ready.config)]
    assert "reference" not in {stage for _, stage, _ in steps_of(STAGES, ready.config)}
    assert "reference" not in [s.name for s in run_status(ready.run, ready.config).stages]
    assert ready.run.reference not in by_name("dpo").reads(ready.run, ready.config)


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_the_others_need_it_first(copied: Callable[..., Ready], method: str) -> None:
    ready = copied(f"dpo.method={method}")
    names = [stage.name for stage in needed_before(by_name("dpo"), ready.run, ready.config)]
    assert names[-2:] == ["pairs", "reference"]


# Read back


def test_what_was_computed_is_read_back(copied: Callable[..., Ready], undisturbed: bytes) -> None:
    ready = copied()
    ready.run.reference.parent.mkdir()
    ready.run.reference.write_bytes(undisturbed)
    found = read_reference(ready.run, ready.config)
    assert list(found) == [row["id"] for row in read_jsonl(ready.run.preferences)]
    assert all(isinstance(one, float) for sums in found.values() for one in sums)


def without(ready: Ready, row_id: str) -> None:
    lines = [line for line in read_jsonl(ready.run.reference) if line["id"] != row_id]
    write_jsonl(ready.run.reference, lines)


def test_a_pair_without_a_reference_is_one_clear_message(
    copied: Callable[..., Ready], undisturbed: bytes
) -> None:
    ready = copied()
    with pytest.raises(DataError, match="are missing") as missing:
        read_reference(ready.run, ready.config)
    assert "--only reference" in missing.value.fix
    ready.run.reference.parent.mkdir()
    ready.run.reference.write_bytes(undisturbed)
    third = list(lines_of(ready))[2]
    without(ready, third)
    with pytest.raises(DataError, match=third) as refused:
        read_reference(ready.run, ready.config)
    assert "--only reference --force reference" in refused.value.fix


def test_a_pair_that_killed_its_processes_ends_the_stage(
    copied: Callable[..., Ready], undisturbed: bytes
) -> None:
    ready = copied()

    def drive(phase: Any, console: Any) -> list[Any]:
        lines = [{**line} for line in map(dict, read_lines(undisturbed, ready))]
        lines[1] = {"id": lines[1]["id"], "error": "ended its process", "quarantined": True}
        write_jsonl(ready.run.reference, lines)
        return []

    with pytest.raises(MedtrainError, match="ended its process again and again") as ended:
        compute_reference(ready.run, ready.config, ready.console, drive)
    assert "mem_gb" in ended.value.fix
    with pytest.raises(DataError, match="has no log-probabilities"):
        read_reference(ready.run, ready.config)


def read_lines(content: bytes, ready: Ready) -> list[dict[str, Any]]:
    ready.run.reference.parent.mkdir(exist_ok=True)
    ready.run.reference.write_bytes(content)
    return list(read_jsonl(ready.run.reference))


def test_without_an_sft_adapter_it_says_so(make_run: MakeRun) -> None:
    ready = make_run()
    with pytest.raises(DataError, match="holds no adapter"):
        compute(ready)


def test_without_pairs_the_file_is_empty(copied: Callable[..., Ready]) -> None:
    ready = copied()
    write_jsonl(ready.run.preferences, [])
    assert compute(ready)["pairs"] == 0
    assert ready.run.reference.read_bytes() == b""


def test_the_configuration_of_every_method_says_whether_it_needs_one() -> None:
    def config_of(method: str) -> RunConfig:
        return RunConfig.model_validate({
            "name": "r", "model": {"base": "b"}, "dpo": {"method": method},
            "data": {"sources": [{"adapter": "table", "path": "x"}]},
        })  # fmt: skip

    needs = {m: config_of(m).dpo.needs_reference for m in ("dpo", "kto", "orpo", "rejection")}
    assert needs == {"dpo": True, "kto": True, "orpo": False, "rejection": False}
