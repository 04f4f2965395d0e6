"""Which checkpoints are whole, which one counts, and how an adapter is published from one.

trainer writes checkpoint-<step>/ → every file fsynced → the adapter reopened and looked at → a
manifest of all files, their sizes and SHA-256, written last → verified → only then are older ones
removed, but for the best → at the end the best (or the last) one's adapter becomes <stage>/adapter,
by rename. A killed run goes on from the newest checkpoint whose files are those of its manifest.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from medtrain.errors import DataError, MedtrainError, TryAgainError
from medtrain.files import (
    digest_of,
    fsync_directory,
    read_json,
    sha256_file,
    tree_files,
    write_json,
)
from medtrain.run import Run, Trained
from medtrain.train.adapter import CONFIG_FILE, FACTS_FILE, WEIGHTS_FILE, AdapterFacts

_MANIFEST = "complete.json"
_PREFIX = "checkpoint-"


class Plan(NamedTuple):
    """What a checkpoint must agree on with the training that goes on from it."""

    max_steps: int
    steps_per_epoch: int
    rows_a_step: int
    processes: int
    strategy: str = "ddp"
    """Of medtrain.config.training.Strategy."""

    @property
    def each(self) -> int:
        """Rows of a step that each process has."""
        return self.rows_a_step // self.processes


class Checkpoint(NamedTuple):
    """A whole checkpoint."""

    path: Path
    step: int
    finished: bool
    """Training ended with it, by its last step or by early stopping."""
    evaluated: bool
    """Whether an evaluation that was due at its step was done; if not, it is what comes next."""
    history: list[dict[str, Any]]
    """The trainer's log up to here."""
    plan: Plan


def complete(path: Path, *, step: int, finished: bool, evaluated: bool, plan: Plan) -> None:
    """Make a checkpoint durable, then say that it is whole, by its manifest.

    Raises:
        MedtrainError: what was written is not what is there now.
    """
    files = {}
    for file in tree_files(path):
        if file.name == _MANIFEST:
            continue
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        name = str(file.relative_to(path))
        files[name] = {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
    fsync_directory(path)
    facts = {"step": step, "finished": finished, "evaluated": evaluated, "plan": plan._asdict(),
             "files": files}  # fmt: skip
    write_json(path / _MANIFEST, {**facts, "digest": digest_of(facts)})
    fsync_directory(path.parent)
    if why := why_not_whole(path):
        raise MedtrainError(f"The checkpoint {path} was written and cannot be read back: {why}")


def why_not_whole(path: Path) -> str | None:
    """What differs between a checkpoint's files and its manifest; None where nothing does."""
    try:
        facts = read_json(path / _MANIFEST)
        if facts.pop("digest") != digest_of(facts):
            return "its manifest is not as it was written"
        for name, known in facts["files"].items():
            if (path / name).stat().st_size != known["bytes"]:
                return f"{name} has another size"
            if sha256_file(path / name) != known["sha256"]:
                return f"{name} has another content"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except OSError as error:
        raise TryAgainError(
            f"The checkpoint {path} cannot be read now: {error}",
            fix="Run the same command when the file system answers again; nothing was removed.",
        ) from error
    except (DataError, AttributeError, KeyError, TypeError) as error:
        return f"its manifest cannot be read ({type(error).__name__})"
    return None


def newest_whole(directory: Path) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint of the highest step that is whole, and why newer ones are not."""
    refused: list[str] = []
    for step, path in sorted(
        ((step, path) for path, step in _checkpoints(directory)), reverse=True
    ):
        why = why_not_whole(path)
        if why is None:
            return _read(path), refused
        if (path / _MANIFEST).exists():
            refused.append(f"checkpoint {step} is damaged: {why}")
    return None, refused


def check_adapter(
    path: Path,
    expected: Mapping[str, torch.Size],
    *,
    dtype: torch.dtype = torch.float32,
    learnt: bool = True,
) -> None:
    """Reopen the adapter of a checkpoint and look at what is in it.

    Sharded training is known for writing files that hold empty or untrained tensors.

    Args:
        path: a directory with an adapter's weights.
        expected: shape of every trained weight, by the name it has in the file.
        dtype: of the trained weights.
        learnt: whether the model's own B is not zero any more, so that the file's must not be.

    Raises:
        MedtrainError: there is no such file; a weight is missing, empty, of another shape or dtype,
            or no number; or every B is zero.
    """
    if not (path / WEIGHTS_FILE).is_file():
        raise _unsound(path, f"{WEIGHTS_FILE} was not written")
    weights = load_file(path / WEIGHTS_FILE)
    for name, shape in expected.items():
        if name not in weights:
            raise _unsound(path, f"{name} is missing")
        if weights[name].shape != shape:
            raise _unsound(path, f"{name} has the shape {tuple(weights[name].shape)}, not "
                           f"{tuple(shape)}")  # fmt: skip
    for name, weight in weights.items():
        if name not in expected:
            raise _unsound(path, f"{name} is not a weight of the adapter")
        if weight.dtype != dtype:
            raise _unsound(path, f"{name} is {weight.dtype}, not {dtype}")
        if not bool(torch.isfinite(weight).all()):
            raise _unsound(path, f"{name} holds numbers that are none")
    if learnt and not any(bool(w.any()) for name, w in weights.items() if "lora_B" in name):
        raise _unsound(path, "every B is zero, as before the first step")
    least = sum(math.prod(shape) for shape in expected.values()) * 2
    if (path / WEIGHTS_FILE).stat().st_size < least:
        raise _unsound(path, f"{WEIGHTS_FILE} is smaller than its weights")


def _unsound(path: Path, why: str) -> MedtrainError:
    return MedtrainError(
        f"The adapter in {path} was not saved as it should be: {why}",
        fix="Run the same command: it goes on from the checkpoint before. If it happens again, try "
        "another train.strategy.",
    )


def rewrite_history(checkpoint: Checkpoint, history: Sequence[dict[str, Any]]) -> None:
    """Add an evaluation that was done later to a checkpoint, and call it whole again."""
    file = checkpoint.path / "trainer_state.json"
    state = read_json(file)
    state["log_history"] = list(history)
    (checkpoint.path / _MANIFEST).unlink()
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(state, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(file)
    complete(checkpoint.path, step=checkpoint.step, finished=checkpoint.finished, evaluated=True,
             plan=checkpoint.plan)  # fmt: skip


def at_step(directory: Path, step: int) -> Checkpoint:
    """The whole checkpoint of one step, which must exist."""
    return _read(directory / f"{_PREFIX}{step}")


def best_step(history: Sequence[dict[str, Any]]) -> int | None:
    """The step of the lowest evaluation loss, the earliest of equals; None without evaluations."""
    losses = [(line["eval_loss"], line["step"]) for line in _evaluations(history)]
    return min(losses)[1] if losses else None


def evaluations_since_best(history: Sequence[dict[str, Any]]) -> int:
    """How many evaluations the loss has not become lower."""
    best = best_step(history) or 0
    return sum(line["step"] > best for line in _evaluations(history))


def _evaluations(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Evaluations after a step: one before the first has no checkpoint."""
    return [line for line in history if "eval_loss" in line and line["step"] > 0]


def prune_to_best(directory: Path, step: int, history: Sequence[dict[str, Any]]) -> None:
    """Keep the checkpoint of a step, the one before it lest that be damaged, and the best."""
    best = best_step(history)
    before = [s for path, s in _checkpoints(directory) if s < step and _is_complete(path)]
    kept = {step, *([] if best is None else [best]), *([max(before)] if before else [])}
    _prune(directory, kept)


def prune_beyond(directory: Path, step: int) -> None:
    """Remove the checkpoints after a step, and what a killed process left half written."""
    _prune(directory, {s for _, s in _checkpoints(directory) if s <= step})


def put_aside(directory: Path, aside: Path) -> None:
    """Move checkpoints that are of no use to `aside`, in place of those put there before.

    What no manifest says was ever whole is removed.
    """
    for path, _ in _checkpoints(directory):
        if not _is_complete(path):
            shutil.rmtree(path)
    if not _checkpoints(directory):
        shutil.rmtree(directory, ignore_errors=True)
        return
    target = aside / directory.name
    shutil.rmtree(target, ignore_errors=True)
    aside.mkdir(parents=True, exist_ok=True)
    directory.rename(target)


def _prune(directory: Path, keep: set[int]) -> None:
    """The manifest goes first: a directory whose removal is interrupted is not taken for whole."""
    for path, step in _checkpoints(directory):
        if step not in keep or not _is_complete(path):
            (path / _MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path)


def publish_adapter(run: Run, stage: Trained, checkpoint: Checkpoint, facts: AdapterFacts) -> None:
    """Make a checkpoint's adapter, with the tokenizer, the run's adapter of this stage."""
    target = run.adapter(stage)
    for leftover in target.parent.glob(f".tmp-{target.name}-*"):
        shutil.rmtree(leftover)
    temporary = target.with_name(f".tmp-{target.name}-{uuid.uuid4().hex}")
    shutil.copytree(run.tokenizer, temporary)
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        shutil.copyfile(checkpoint.path / name, temporary / name)
    write_json(temporary / FACTS_FILE, facts._asdict())
    for file in tree_files(temporary):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    if target.exists():
        target.rename(target.with_name(f".tmp-{target.name}-{uuid.uuid4().hex}"))
    temporary.rename(target)
    fsync_directory(target.parent)
    for leftover in target.parent.glob(f".tmp-{target.name}-*"):
        shutil.rmtree(leftover)


def _checkpoints(directory: Path) -> list[tuple[Path, int]]:
    found = directory.glob(f"{_PREFIX}*")
    numbers = ((path, path.name.removeprefix(_PREFIX)) for path in found if path.is_dir())
    return [(path, int(number)) for path, number in numbers if number.isdigit()]


def _is_complete(path: Path) -> bool:
    return (path / _MANIFEST).is_file()


def _read(path: Path) -> Checkpoint:
    facts = read_json(path / _MANIFEST)
    history = read_json(path / "trainer_state.json")["log_history"]
    plan = Plan(**facts["plan"])
    return Checkpoint(path, facts["step"], facts["finished"], facts["evaluated"], history, plan)
