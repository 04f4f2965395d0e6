"""`medtrain doctor`: is everything here that a run needs, and what to do where it is not.

children that look at devices and at all-reduce start first; meanwhile versions, the file system,
tokens → findings, each pass, warn, fail or skip → DoctorReport, a table on a terminal, a line a
check in a log, JSON for programs. With `cluster`, Slurm is asked too, and a small job looks at it
from inside.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from medtrain.cluster.checks.access import check_access, hub_cache, hub_id
from medtrain.cluster.checks.all_reduce import check_local, start_local_ranks
from medtrain.cluster.checks.devices import check_devices, start_device_task
from medtrain.cluster.checks.filesystem import check_file_system
from medtrain.cluster.checks.finding import Finding, skipped
from medtrain.cluster.checks.probe import run_probe
from medtrain.cluster.checks.probe_findings import judge_probe
from medtrain.cluster.checks.scheduler import ask_slurm, partition_fields
from medtrain.cluster.checks.software import check_software
from medtrain.cluster.site import resources_of
from medtrain.config import ClusterConfig, RunConfig, parse_config, site_section
from medtrain.console import Console, key_value_line
from medtrain.errors import BadNodeError

PROBE_WAIT_S = 120.0
"""How long the probe job may wait in the queue."""

_NEEDED_BY_PROBE = ("write access", "flock")

_MARKS = {"pass": ("✓", "green"), "warn": ("!", "yellow"), "fail": ("✗", "bold red"),
          "skip": ("·", "dim")}  # fmt: skip


@dataclass(frozen=True, slots=True)
class DoctorReport:
    """All findings, in the order they were looked at."""

    findings: tuple[Finding, ...]

    @property
    def exit_code(self) -> int:
        """0 when nothing failed, else that of a bad node."""
        return BadNodeError.exit_code if self.count("fail") else 0

    @property
    def summary(self) -> str:
        """How many of which mark."""
        return ", ".join(f"{count} {mark}" for mark in _MARKS if (count := self.count(mark)))

    def count(self, mark: str) -> int:
        """How many findings have a mark."""
        return sum(finding.mark == mark for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "host": socket.gethostname(),
            "exit_code": self.exit_code,
            "counts": {mark: self.count(mark) for mark in _MARKS},
            "checks": [finding.to_json() for finding in self.findings],
        }

    def lines(self) -> Iterator[str]:
        """One `key=value` line a check, and one for all."""
        for finding in self.findings:
            fields = {"check": finding.check, "mark": finding.mark, "found": finding.found}
            yield key_value_line("doctor", fields | ({"fix": finding.fix} if finding.fix else {}))
        yield key_value_line("doctor_done", {mark: self.count(mark) for mark in _MARKS})

    def show(self, console: Console) -> None:
        """The table on a terminal, the lines in a log."""
        if console.on_terminal:
            console.show(self)
        elif not console.silent:
            for line in self.lines():
                print(line, flush=True)

    def __rich__(self) -> Table:
        table = Table(box=None, pad_edge=False, show_header=False, caption_justify="left",
                      caption=Text(self.summary))  # fmt: skip
        table.add_column("mark", no_wrap=True)
        table.add_column("check", no_wrap=True)
        table.add_column("found", overflow="fold")
        for finding in self.findings:
            symbol, style = _MARKS[finding.mark]
            found = Text(finding.found, style="dim" if finding.mark == "skip" else "")
            if finding.fix:
                found.append(f"\n→ {finding.fix}", style="cyan")
            table.add_row(Text(symbol, style=style), Text(finding.check), found)
        return table


def run_doctor(
    config: RunConfig | None,
    console: Console,
    *,
    cluster: bool,
    directory: Path,
    probe_wait_s: float = PROBE_WAIT_S,
) -> DoctorReport:
    """Look at this machine, and with `cluster` at Slurm and its nodes.

    Args:
        config: the run that is to be made possible; None for medtrain in general.
        console: told of the probe job; the report is shown by the caller.
        cluster: ask Slurm, and submit the probe job.
        directory: where runs are kept (`output_dir`); need not exist.
        probe_wait_s: how long the probe job may wait in the queue, in seconds.
    """
    general = config if config is not None else _usual()
    site = general.cluster
    with _busy(console, "looking at this machine"):
        findings = _this_machine(config, site, cluster=cluster, directory=directory)
    if cluster:
        with _busy(console, "asking Slurm, and waiting for a small job on two nodes"):
            findings += _slurm(general, console, directory, probe_wait_s, findings)
    return DoctorReport(tuple(findings))


def _busy(console: Console, what: str) -> AbstractContextManager[Any]:
    shown = console.on_terminal and not console.silent
    return console.rich.status(what) if shown else nullcontext()


def _this_machine(
    config: RunConfig | None, site: ClusterConfig, *, cluster: bool, directory: Path
) -> list[Finding]:
    with ExitStack() as children:
        devices = children.enter_context(start_device_task())
        ranks = [children.enter_context(rank) for rank in start_local_ranks()]
        software = check_software()
        files = check_file_system(directory, config)
        access = check_access(config, site, cluster=cluster)
        return [
            *software,
            *check_devices(devices, config),
            check_local(ranks),
            *files,
            *access,
        ]


def _usual() -> RunConfig:
    """What a job asks for by default and by the site's file, where no run is named."""
    site = site_section()
    # Of the built-in base no job asks for a GPU; where the site names some, they are tried.
    base = "." if site.get("gpus") else "builtin:tiny"
    source = {"adapter": "table", "path": "builtin:questions"}
    tree = {"name": "doctor", "model": {"base": base}, "data": {"sources": [source]}}
    return parse_config({**tree, "cluster": site}, source="the site's file")


def _slurm(
    config: RunConfig,
    console: Console,
    directory: Path,
    probe_wait_s: float,
    before: list[Finding],
) -> list[Finding]:
    slurm = ask_slurm(config)
    if not slurm.answers:
        return slurm.findings
    needed = [*slurm.findings, *(f for f in before if f.check in _NEEDED_BY_PROBE)]
    if any(finding.mark == "fail" for finding in needed):
        return [*slurm.findings, skipped("probe job", "mend what failed above first")]
    partition = partition_fields(slurm.partitions, resources_of(config, "sft").partition)
    paths = _paths_of_jobs(config)
    probe = run_probe(config, partition, directory, console, wait_s=probe_wait_s, paths=paths)
    return [*slurm.findings, *judge_probe(probe, config, directory)]


def _paths_of_jobs(config: RunConfig) -> list[str]:
    """What every node must see besides the runs."""
    site = config.cluster
    paths = [Path(site.secrets_file).expanduser()] if site.secrets_file else []
    if hub_id(config) and site.offline:
        paths.append(hub_cache(site))
    else:
        paths.append(Path(config.model.base).expanduser())
    # What this host does not have either is told of elsewhere.
    return [str(path.absolute()) for path in paths if path.exists()]
