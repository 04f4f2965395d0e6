"""Only whole checkpoints are gone on from, and none is lost before a newer one is whole."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from medtrain.errors import ConfigError, DataError, MedtrainError
from medtrain.files import read_json, tree_files
from medtrain.train import checkpoints
from medtrain.train.adapter import WEIGHTS_FILE
from medtrain.train.checkpoints import Plan, check_adapter, newest_whole, prune_to_best
from tests.train.conftest import MakeRun, Ready, make_ready
from tests.train.training import same_training, stopped_at, train

_PLAN = Plan(12, 6, 8, 1)
_SFT: dict[str, Any] = {
    "sft": {"epochs": 2, "evals_per_epoch": 2, "keep_best": False, "max_length": 64}
}


class Killed(Exception):  # noqa: N818 - not an error: a process that ends here
    """Stands for the death of the process at a chosen line."""


def die(*args: Any, **kwargs: Any) -> None:
    raise Killed


# What is whole


def write_checkpoint(
    directory: Path, step: int, *, whole: bool = True, losses: dict[int, float] | None = None
) -> Path:
    path = directory / f"checkpoint-{step}"
    path.mkdir(parents=True)
    history = [{"step": s, "eval_loss": loss} for s, loss in (losses or {}).items() if s <= step]
    (path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    (path / WEIGHTS_FILE).write_bytes(b"weights")
    (path / "below").mkdir()
    (path / "below" / "shard_0").write_bytes(b"of the optimiser")
    if whole:
        checkpoints.complete(path, step=step, finished=False, evaluated=True, plan=_PLAN)
    return path


def steps_left(directory: Path) -> set[int]:
    return {int(path.name.removeprefix("checkpoint-")) for path in directory.iterdir()}


def test_the_newest_whole_checkpoint_counts_by_number(tmp_path: Path) -> None:
    losses = {2: 0.5, 10: 0.9, 9: 0.7}
    for step, whole in ((2, True), (9, True), (10, True), (11, False)):
        write_checkpoint(tmp_path, step, whole=whole, losses=losses)
    found, refused = newest_whole(tmp_path)
    assert found is not None
    assert found.step == 10
    assert found.plan == _PLAN
    assert refused == [], "one that a killed process left half written is nothing to speak of"
    assert checkpoints.best_step(found.history) == 2


def test_pruning_keeps_the_newest_the_one_before_and_the_best(tmp_path: Path) -> None:
    losses = {2: 0.5, 4: 0.6, 6: 0.7, 8: 0.8}
    for step in losses:
        path = write_checkpoint(tmp_path, step, losses=losses)
    write_checkpoint(tmp_path, 7, whole=False)
    prune_to_best(tmp_path, 8, read_json(path / "trainer_state.json")["log_history"])
    assert steps_left(tmp_path) == {2, 6, 8}
    checkpoints.prune_beyond(tmp_path, 6)
    assert steps_left(tmp_path) == {2, 6}


def test_a_removal_that_is_interrupted_leaves_nothing_that_seems_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        write_checkpoint(tmp_path, step)
    monkeypatch.setattr(checkpoints.shutil, "rmtree", die)
    with pytest.raises(Killed):
        checkpoints.prune_beyond(tmp_path, 1)
    found, _ = newest_whole(tmp_path)
    assert found is not None
    assert found.step == 1


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("two")
    write_checkpoint(directory, 1)
    write_checkpoint(directory, 2)
    return directory


@given(st.data())
def test_any_change_to_any_file_is_noticed(two_checkpoints: Path, data: st.DataObject) -> None:
    directory = two_checkpoints.with_name("damaged")
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(two_checkpoints, directory)
    path = directory / "checkpoint-2"
    assert checkpoints.why_not_whole(path) is None
    file = data.draw(st.sampled_from(list(tree_files(path))))
    content = file.read_bytes()
    kind = data.draw(st.sampled_from(["truncate", "flip", "grow", "delete"]))
    if kind == "delete":
        file.unlink()
    elif kind == "grow":
        file.write_bytes(content + b"!")
    else:
        place = data.draw(st.integers(0, len(content) - 1))
        bit = 1 << data.draw(st.integers(0, 7))
        flipped = content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]
        file.write_bytes(content[:place] if kind == "truncate" else flipped)
    # The manifest is JSON: what says the same in other spelling is no damage.
    said_the_same = kind in ("truncate", "flip") and _same_json(file, content)
    found, _ = newest_whole(directory)
    assert found is not None
    assert found.step == (2 if said_the_same else 1)


def _same_json(file: Path, before: bytes) -> bool:
    try:
        return file.name == "complete.json" and json.loads(file.read_bytes()) == json.loads(before)
    except ValueError:
        return False


@pytest.mark.parametrize("content", ["", "[]", "null", '"', "{}", '{"files": {}}', '{"step": 3}'])
def test_a_manifest_that_says_nothing_is_none(tmp_path: Path, content: str) -> None:
    write_checkpoint(tmp_path, 1)
    (write_checkpoint(tmp_path, 2) / "complete.json").write_text(content)
    found, refused = newest_whole(tmp_path)
    assert found is not None
    assert found.step == 1
    assert len(refused) == 1
    assert "checkpoint 2 is damaged: its manifest" in refused[0]


def test_what_was_not_written_as_it_should_be_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that loses what it was given."""
    path = write_checkpoint(tmp_path, 1, whole=False)
    write = checkpoints.write_json

    def losing(target: Path, content: Any) -> None:
        write(target, content)
        (path / WEIGHTS_FILE).write_bytes(b"WEIGHTS")

    monkeypatch.setattr(checkpoints, "write_json", losing)
    with pytest.raises(MedtrainError, match=f"{WEIGHTS_FILE} has another content"):
        checkpoints.complete(path, step=1, finished=False, evaluated=True, plan=_PLAN)


def test_an_adapter_that_was_not_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MedtrainError, match=f"{WEIGHTS_FILE} was not written"):
        checkpoints.check_adapter(tmp_path, {})


# Going on from what is left


@pytest.fixture(scope="module")
def undisturbed(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Ready:
    ready = make_ready(tmp_path_factory.mktemp("undisturbed") / "run", base_dir, **_SFT)
    assert train(ready, "sft")["steps"] == 12
    return ready


@pytest.fixture(scope="module")
def stopped(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Ready:
    """Checkpoints 6 and 8 of the same training; not to be changed."""
    ready = make_ready(tmp_path_factory.mktemp("stopped") / "run", base_dir, **_SFT)
    with pytest.MonkeyPatch.context() as monkeypatch:
        stopped_at(ready, "sft", monkeypatch, 8)
    return ready


@pytest.fixture
def copy_stopped(make_run: MakeRun, stopped: Ready) -> Callable[..., Ready]:
    """Copies of it, under a configuration changed in places."""

    def make(**changes: Any) -> Ready:
        ready = make_run(**{**_SFT, **changes})
        shutil.copytree(stopped.run.checkpoints("sft"), ready.run.checkpoints("sft"))
        ready.run.metrics("sft").parent.mkdir(exist_ok=True)
        shutil.copyfile(stopped.run.metrics("sft"), ready.run.metrics("sft"))
        return ready

    return make


def _delete(file: Path) -> None:
    file.unlink()


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[random.Random(0).randrange(len(content))] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage"),
    [(WEIGHTS_FILE, _flip), ("optimizer.pt", _truncate), ("rng_state.pth", _delete),
     ("trainer_state.json", _flip), ("sums_0.json", _delete), ("complete.json", _flip)],
)  # fmt: skip
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    copy_stopped: Callable[..., Ready], undisturbed: Ready, name: str, damage: Any
) -> None:
    ready = copy_stopped()
    damage(ready.run.checkpoints("sft") / "checkpoint-8" / name)
    train(ready, "sft")
    log = ready.run.log.read_text()
    assert "event=checkpoint_refused" in log
    assert "going on from step 6 of 12" in log
    same_training(ready.run, undisturbed.run, "sft")


def test_without_a_whole_checkpoint_it_begins_anew(
    copy_stopped: Callable[..., Ready], undisturbed: Ready
) -> None:
    ready = copy_stopped()
    for path in ready.run.checkpoints("sft").iterdir():
        _truncate(path / WEIGHTS_FILE)
    train(ready, "sft")
    assert "event=resume" not in ready.run.log.read_text()
    same_training(ready.run, undisturbed.run, "sft")


def test_at_the_end_the_last_the_one_before_and_the_best_are_left(undisturbed: Ready) -> None:
    directory = undisturbed.run.checkpoints("sft")
    found, _ = newest_whole(directory)
    assert found is not None
    best = checkpoints.best_step(found.history)
    assert steps_left(directory) == {9, 12, best}
    assert all(checkpoints.why_not_whole(path) is None for path in directory.iterdir())


def test_a_damaged_best_checkpoint_is_said_and_not_published(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = make_run(sft={**_SFT["sft"], "keep_best": True})
    best = checkpoints.best_step
    monkeypatch.setattr(checkpoints, "best_step", lambda history: min(3, best(history) or 3))
    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "publish_adapter", die)
        with pytest.raises(Killed):
            train(ready, "sft")
    _flip(ready.run.checkpoints("sft") / "checkpoint-3" / WEIGHTS_FILE)
    with pytest.raises(DataError, match=r"best checkpoint, .*checkpoint-3, is damaged"):
        train(ready, "sft")
    assert not ready.run.adapter("sft").exists()


# Another plan


def rewritten(ready: Ready, plan: Plan) -> None:
    """Make the checkpoints say that another plan wrote them."""
    for path in ready.run.checkpoints("sft").iterdir():
        facts = read_json(path / "complete.json")
        checkpoints.complete(path, step=facts["step"], finished=facts["finished"],
                             evaluated=facts["evaluated"], plan=plan)  # fmt: skip


@pytest.mark.parametrize(
    ("plan", "reason"),
    [(Plan(12, 6, 8, 2, "zero2"), "2 processes under zero2, and 1 process under ddp cannot read"),
     (Plan(12, 6, 8, 1, "zero3"), "1 process under zero3, and 1 process under ddp cannot read"),
     (Plan(6, 3, 16, 2, "ddp"), "16 rows a step by 2 processes; 1 process would make 8")],
)  # fmt: skip
def test_checkpoints_of_other_processes_are_refused_and_left_alone(
    copy_stopped: Callable[..., Ready], plan: Plan, reason: str
) -> None:
    ready = copy_stopped()
    rewritten(ready, plan)
    directory = ready.run.checkpoints("sft")
    before = {path: path.read_bytes() for path in tree_files(directory)}
    with pytest.raises(ConfigError, match=reason) as caught:
        train(ready, "sft")
    assert "--force sft" in caught.value.fix
    assert {path: path.read_bytes() for path in tree_files(directory)} == before


def test_as_many_rows_a_step_on_other_processes_are_gone_on_from(
    copy_stopped: Callable[..., Ready],
) -> None:
    ready = copy_stopped()
    rewritten(ready, Plan(12, 6, 8, 4, "ddp"))
    assert train(ready, "sft")["steps"] == 12
    log = ready.run.log.read_text()
    assert "event=processes_changed" in log
    assert "going on from step 8 of 12" in log


@pytest.mark.parametrize("change", [{"epochs": 1}, {"batch_size": 4}, {"gradient_accumulation": 2}])
def test_another_number_of_steps_or_rows_begins_anew(
    copy_stopped: Callable[..., Ready], change: dict[str, int]
) -> None:
    ready = copy_stopped(sft={**_SFT["sft"], **change})
    train(ready, "sft")
    log = ready.run.log.read_text()
    assert "event=checkpoints_ignored" in log
    assert "event=resume" not in log


def test_the_same_rows_in_other_forward_passes_are_gone_on_from(
    copy_stopped: Callable[..., Ready],
) -> None:
    """batch_size 4 twice is batch_size 8 once: the same training."""
    ready = copy_stopped(sft={**_SFT["sft"], "batch_size": 4, "gradient_accumulation": 2})
    train(ready, "sft")
    assert "going on from step 8 of 12" in ready.run.log.read_text()


# What an adapter holds


def adapter_with(path: Path, **changes: torch.Tensor | None) -> dict[str, torch.Size]:
    weights: dict[str, torch.Tensor] = {
        "a.lora_A": torch.ones(4, 8), "a.lora_B": torch.ones(8, 4)
    }  # fmt: skip
    expected = {name: weight.shape for name, weight in weights.items()}
    for name, weight in changes.items():
        key = name.replace("__", ".")
        weights.pop(key, None)
        if weight is not None:
            weights[key] = weight
    save_file(weights, path / WEIGHTS_FILE)
    return expected


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"a__lora_B": None}, r"a\.lora_B is missing"),
        ({"a__lora_B": torch.empty(0)}, r"a\.lora_B has the shape \(0,\), not \(8, 4\)"),
        ({"a__lora_A": torch.ones(4, 9)}, r"a\.lora_A has the shape \(4, 9\), not \(4, 8\)"),
        ({"a__lora_A": torch.full((4, 8), torch.nan)}, r"a\.lora_A holds numbers that are none"),
        ({"a__lora_B": torch.full((8, 4), torch.inf)}, r"a\.lora_B holds numbers that are none"),
        ({"b__lora_A": torch.ones(1)}, r"b\.lora_A is not a weight of the adapter"),
        ({"a__lora_A": torch.ones(4, 8, dtype=torch.float16)}, r"a\.lora_A is torch\.float16"),
        ({"a__lora_B": torch.zeros(8, 4)}, "every B is zero"),
    ],
)
def test_an_adapter_that_was_not_saved_whole_is_refused(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    expected = adapter_with(tmp_path, **changes)
    with pytest.raises(MedtrainError, match=reason):
        check_adapter(tmp_path, expected)


def test_a_whole_adapter_is_not_refused(tmp_path: Path) -> None:
    check_adapter(tmp_path, adapter_with(tmp_path))


def test_a_trainer_that_saves_empty_tensors_is_stopped(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medtrain.train import adapter_trainer

    write = adapter_trainer.write_adapter

    def sharded(model: Any, directory: Path, **options: Any) -> None:
        write(model, directory, **options)
        weights = load_file(directory / WEIGHTS_FILE)
        save_file({name: w[:0] for name, w in weights.items()}, directory / WEIGHTS_FILE)

    monkeypatch.setattr(adapter_trainer, "write_adapter", sharded)
    ready = make_run(sft={"max_steps": 2})
    with pytest.raises(MedtrainError, match="was not saved as it should be"):
        train(ready, "sft")
    assert newest_whole(ready.run.checkpoints("sft")) == (None, [])
