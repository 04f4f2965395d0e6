"""What a stage is: what it reads, writes and depends on, the function that does it, its shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from medtrain.config import JobKind, RunConfig
from medtrain.console import Console
from medtrain.run import Run
from medtrain.shards import Drive, Phase, Unit, run_here

Artefacts = Callable[[Run, RunConfig], Sequence[Path]]
Outside = Callable[[Run, RunConfig], Mapping[str, str]]
Work = Callable[[Run, RunConfig, Console], dict[str, Any]]


def _nothing(run: Run, config: RunConfig) -> dict[str, str]:
    return {}


def _no_paths(run: Run, config: RunConfig) -> list[Path]:
    return []


def _always(config: RunConfig) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class PhaseRow:
    """A part of a stage whose rows are computed in shards."""

    name: str
    work: str
    """module:function of `(run, config)`, a context manager that yields the `Phase`."""
    kind: JobKind
    """Whose resources its tasks need."""
    tasks: Callable[[RunConfig], Sequence[tuple[Unit, ...]]]
    """What each task of an array does; known before the rows are. A shard that the rows turn out
    not to fill is finished at once."""

    def open(self, run: Run, config: RunConfig) -> AbstractContextManager[Phase]:
        """The phase itself; its inputs must have been made."""
        module, _, function = self.work.partition(":")
        make = cast("Callable[..., Any]", getattr(import_module(module), function))
        return cast("AbstractContextManager[Phase]", make(run, config))


@dataclass(frozen=True, slots=True)
class Stage:
    """One row of the table."""

    name: str
    title: str
    """What it does, for a person."""
    work: str
    """module:function, imported when the stage runs: the modules are heavy."""
    settings: tuple[str, ...]
    """Sections and keys that change its result."""
    reads: Artefacts = _no_paths
    """Artefacts of earlier stages."""
    writes: Artefacts = _no_paths
    """Artefacts a later stage or a person may use."""
    ignores: tuple[str, ...] = ()
    """Keys below `settings` that change how, not what."""
    split: tuple[str, ...] = ()
    """Keys that may change before it goes on: it sees itself whether what it has still fits."""
    outside: Outside = _nothing
    """Digests of inputs that no stage made."""
    clears: Artefacts = _no_paths
    """What must not be there when it begins under other settings."""
    shards: Artefacts = _no_paths
    """Finished rows, which it uses as far as they still hold; with --force they do not."""
    trains: bool = False
    """Whether it wants every GPU."""
    phases: tuple[PhaseRow, ...] = ()
    """Its sharded parts, in order."""
    wanted: Callable[[RunConfig], bool] = _always
    """Whether a run of this configuration has the stage at all; where not, it counts as done."""
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def run(
        self, run: Run, config: RunConfig, console: Console, drive: Drive = run_here
    ) -> dict[str, Any]:
        """Do the stage's work; returns its counts."""
        module, _, function = self.work.partition(":")
        work = cast("Callable[..., dict[str, Any]]", getattr(import_module(module), function))
        driven = {"drive": drive} if self.phases else {}
        return work(run, config, console, **self.arguments, **driven)

    def active_phases(self, config: RunConfig) -> list[PhaseRow]:
        """Those that have something to do under a configuration."""
        return [phase for phase in self.phases if phase.tasks(config)]


def summary(counts: Mapping[str, Any]) -> str:
    """The first few figures of a receipt, for one line, and whatever failed."""
    figures = {
        key: value
        for key, value in counts.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    first = list(figures)[:3]
    shown = [key for key in figures if key in first or ("failed" in key and figures[key])]
    return ", ".join(f"{key.replace('_', ' ')} {_short(figures[key])}" for key in shown)


def _short(value: float) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"
