"""What a stage was made from, and whether that still holds.

settings (the part of the configuration that changes its result) + digests of its inputs → a
fingerprint, kept in stages/<stage>.json with the sizes and hashes of what it wrote. A stage whose
fingerprint and outputs still hold is finished; otherwise `Standing.why` says what changed.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from medtrain.digests import file_entry
from medtrain.errors import DataError, MedtrainError, StoppedError
from medtrain.files import (
    canonical_json,
    digest_of,
    publish,
    read_json,
    sha256_file,
    tree_files,
    write_json,
)
from medtrain.run import Run

_RECORDED_PACKAGES = (
    "torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "deepspeed", "datasets",
)  # fmt: skip
State = Literal["done", "stale", "started", "missing"]


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a stage stands."""

    state: State
    why: str = ""
    """For `stale`: what changed, in words."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Everything that changes a stage's result."""

    settings: Mapping[str, Any]
    """Dotted key → value."""
    inputs: Mapping[str, str]
    """Name of an input → digest."""

    split: tuple[str, ...] = ()
    """Keys of `settings` that may change before a stage goes on that has begun."""

    @property
    def digest(self) -> str:
        """One hash of all of it."""
        return digest_of([dict(self.settings), dict(self.inputs)])

    @property
    def going_on(self) -> str:
        """One hash of what must be as it was for a stage to go on that has begun."""
        kept = {key: value for key, value in self.settings.items() if key not in self.split}
        return digest_of([kept, dict(self.inputs)])


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping of dotted keys; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def choose(
    flat: Mapping[str, Any], include: Sequence[str], exclude: Sequence[str]
) -> dict[str, Any]:
    """The settings below `include`, less those below `exclude`."""

    def below(key: str, prefixes: Sequence[str]) -> bool:
        return any(key == p or key.startswith(f"{p}.") for p in prefixes)

    return {k: v for k, v in flat.items() if below(k, include) and not below(k, exclude)}


class Lineage:
    """The receipts of a run's stages."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def receipt(self, stage: str) -> dict[str, Any] | None:
        """The receipt of a finished stage."""
        return self._read(f"{stage}.json")

    def started(self, stage: str) -> str | None:
        """The fingerprint a stage was last started with and has not finished."""
        record = self._read(f"{stage}.started.json")
        return record["fingerprint"] if record else None

    def goes_on(self, stage: str, fingerprint: Fingerprint) -> bool:
        """Whether what an unfinished stage has made may be of use under this fingerprint."""
        record = self._read(f"{stage}.started.json")
        return record is not None and record["going_on"] == fingerprint.going_on

    def began_at(self, stage: str) -> float:
        """When a stage that is not finished was first begun, in seconds since the epoch."""
        record = self._read(f"{stage}.started.json")
        return float(record["began_at"]) if record else time.time()

    def standing(self, stage: str, fingerprint: Fingerprint) -> Standing:
        """Whether a stage's receipt and outputs still hold for this fingerprint."""
        receipt = self.receipt(stage)
        if receipt is None:
            return Standing("started" if self.started(stage) else "missing")
        if receipt["fingerprint"] != fingerprint.digest:
            return Standing("stale", _difference(receipt, fingerprint))
        damaged = self.damaged_output(receipt)
        return Standing("stale", damaged) if damaged else Standing("done")

    def start(self, stage: str, fingerprint: Fingerprint) -> None:
        """Note that a stage begins or goes on; what stood finished by its name no longer does."""
        before = self._read(f"{stage}.started.json")
        same = before is not None and before["fingerprint"] == fingerprint.digest
        began_at = before["began_at"] if before is not None and same else time.time()
        write_json(
            self.run.stages / f"{stage}.started.json",
            {
                "stage": stage,
                "fingerprint": fingerprint.digest,
                "began_at": began_at,
                "going_on": fingerprint.going_on,
            },
        )
        self._path(f"{stage}.json").unlink(missing_ok=True)
        self.forget_failure(stage)

    def finish(
        self,
        stage: str,
        fingerprint: Fingerprint,
        outputs: Iterable[Path],
        counts: Mapping[str, Any],
        seconds: float,
        finished_at: str,
    ) -> None:
        """Publish the receipt of a finished stage."""
        receipt = {
            "stage": stage,
            "fingerprint": fingerprint.digest,
            "settings": dict(fingerprint.settings),
            "inputs": dict(fingerprint.inputs),
            "outputs": self._describe(outputs),
            "counts": dict(counts),
            "seconds": round(seconds, 3),
            "finished_at": finished_at,
            "versions": versions(),
        }
        write_json(self._path(f"{stage}.json"), receipt)
        self._path(f"{stage}.started.json").unlink(missing_ok=True)

    def forget(self, stage: str) -> None:
        """Drop a stage's receipts, so that it runs from its beginning."""
        for suffix in ("json", "started.json", "failure.json"):
            self._path(f"{stage}.{suffix}").unlink(missing_ok=True)

    def record_failure(self, stage: str, error: MedtrainError) -> None:
        """Keep an error for the parent: launchers turn every exit code into 1.

        Of several processes the first counts: the others fail because it did.
        """
        failure = {"exit_code": error.exit_code, "message": error.message, "fix": error.fix,
                   "stopped": isinstance(error, StoppedError)}  # fmt: skip
        # Where the disk is full, the error is still raised.
        with suppress(OSError):
            publish(self._path(f"{stage}.failure.json"), canonical_json(failure).encode())

    def forget_failure(self, stage: str) -> None:
        """A new try begins."""
        self._path(f"{stage}.failure.json").unlink(missing_ok=True)

    def failure(self, stage: str) -> dict[str, Any] | None:
        """The error that ended a stage's last try in another process."""
        return self._read(f"{stage}.failure.json")

    def input_digest(self, path: Path) -> str:
        """Digest of an artefact, from the receipt of the stage that wrote it.

        Raises:
            DataError: no finished stage has written it.
        """
        wanted = self._relative(path)
        parts = [
            (name, entry["sha256"])
            for receipt_path in sorted(self.run.stages.glob("*.json"))
            if receipt_path.name.count(".") == 1
            # Another process may have begun that stage anew a moment ago.
            for name, entry in (self._read(receipt_path.name) or {"outputs": {}})["outputs"].items()
            if name == wanted or name.startswith(f"{wanted}/")
        ]
        if not parts:
            raise DataError(
                f"{path} has not been made yet",
                fix=f"Run the stages before: medtrain run {self.run.config} --until STAGE",
            )
        return digest_of(sorted(parts))

    def _describe(self, outputs: Iterable[Path]) -> dict[str, dict[str, Any]]:
        files = (file for output in outputs if output.exists() for file in tree_files(output))
        return {self._relative(file): file_entry(file) for file in files}

    def was_made(self, path: Path) -> bool:
        """Whether a finished stage has written an artefact."""
        try:
            self.input_digest(path)
        except DataError:
            return False
        return True

    def damaged_output(self, receipt: Mapping[str, Any]) -> str:
        """Which output is missing or was changed since it was written, in words; or nothing."""
        for name, entry in receipt["outputs"].items():
            path = self.run.root / name
            if not path.is_file():
                return f"{name} is missing"
            stat = path.stat()
            if stat.st_size != entry["bytes"]:
                return f"{name} was changed"
            if stat.st_mtime_ns != entry["mtime_ns"] and sha256_file(path) != entry["sha256"]:
                return f"{name} was changed"
        return ""

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.run.root).as_posix()

    def _path(self, name: str) -> Path:
        return self.run.stages / name

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            record: dict[str, Any] = read_json(self._path(name))
        except FileNotFoundError:
            return None
        return record


def versions() -> dict[str, str]:
    """Versions of Python, medtrain and the libraries that change results."""
    found = {"python": platform.python_version()}
    for package in ("medtrain", *_RECORDED_PACKAGES):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _difference(receipt: Mapping[str, Any], now: Fingerprint) -> str:
    before, after = _items(receipt["settings"]), _items(now.settings)
    changed = [
        f"{key} {_short(before.get(key))} → {_short(after.get(key))}"
        for key in sorted(set(before) | set(after))
        if before.get(key) != after.get(key)
    ]
    inputs = receipt["inputs"]
    changed += [
        f"{name} changed"
        for name in sorted(set(inputs) | set(now.inputs))
        if inputs.get(name) != now.inputs.get(name)
    ]
    shown = ", ".join(changed[:4])
    return f"{shown} and {len(changed) - 4} more" if len(changed) > 4 else shown


def _items(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the entries of lists as keys of their own, so that a change can be named."""
    items: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
            numbered = {str(i): e if isinstance(e, dict) else {"": e} for i, e in enumerate(value)}
            items.update(flatten(numbered, f"{key}."))
        else:
            items[key] = value
    return items


def _short(value: Any) -> str:
    text = "unset" if value is None else str(value)
    return text if len(text) <= 40 else text[:39] + "…"
