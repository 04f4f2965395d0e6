"""A small job that looks at the cluster from inside: two tasks, on two nodes where there are two.

request.json in a directory below the run's → sbatch, script on standard input → wait in the queue,
up to a deadline → one JSON file from each task → USR1, which is asked for early in the job's
three minutes, so that nobody waits for its end → scancel, and the directory is gone.

Compute nodes that do not see the directory leave no file: that is a finding of its own.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medtrain.cluster.checks.asking import ask
from medtrain.cluster.checks.filesystem import nearest_existing, scratch_directory
from medtrain.cluster.checks.probe_task import without_job_variables
from medtrain.cluster.site import job_python, sbatch_options, setup_lines
from medtrain.config import RunConfig
from medtrain.console import Console
from medtrain.files import read_json, write_json

TASKS = 2
LIMIT_S = 180
SIGNAL_BEFORE_S = 120
"""Slurm looks at time limits every half minute, and signals up to a minute early."""
SIGNAL_WAIT_S = 80.0
_POLL_S = 1.0
_CANCEL_WAIT_S = 20.0
_MEMORY_MB_PER_TASK = 1_536
"""PyTorch alone takes a third of this."""
_NOT_FOR_PROBES = {"mail-type", "mail-user", "time", "nodes", "ntasks", "exclusive", "mem",
                   "mem-per-cpu", "mem-per-gpu", "cpus-per-task", "ntasks-per-node",
                   "requeue"}  # fmt: skip
"""Options of training jobs that would make the probe wait, or disagree with its own."""
_OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL",
         "DEADLINE", "PREEMPTED", "FORGOTTEN")  # fmt: skip
_FORGOTTEN = "FORGOTTEN"
"""Slurm knows an ended job for MinJobAge only."""


@dataclass
class ProbeResult:
    """What came back from the job."""

    job_id: str = ""
    refused: str = ""
    """What sbatch said, where it took no job."""
    nodes: int = TASKS
    state: str = ""
    reason: str = ""
    log: str = ""
    """The last line of the job's log."""
    submitted: float = 0.0
    tasks: dict[int, dict[str, Any]] = field(default_factory=dict)
    seen: dict[int, float] = field(default_factory=dict)
    """When each task's file was seen here, by this host's clock."""
    signals: dict[int, float | None] = field(default_factory=dict)
    """Seconds after the task's begin; None where none arrived."""


def probe_options(config: RunConfig) -> list[str]:
    """Where the probe runs, as options of sbatch: where training does, on one GPU of a node."""
    options = {n: v for n, v in sbatch_options(config, "sft").items() if n not in _NOT_FOR_PROBES}
    if "gpus-per-node" in options:
        kind, separator, _ = str(options["gpus-per-node"]).rpartition(":")
        options["gpus-per-node"] = f"{kind}{separator}1"
    return [
        f"--{name}" if value is True else f"--{name}={value}"
        for name, value in options.items()
        if value is not False
    ]


def script(config: RunConfig, directory: Path) -> str:
    """The probe's batch script."""
    srun = shlex.join(["srun", "--input=none", *config.cluster.srun])
    task = f"-m medtrain.cluster.checks.probe_task {shlex.quote(str(directory))}"
    lines = [
        "#!/bin/bash",
        *setup_lines(config),
        # srun gives each task its own SLURMD_NODENAME; here it is the head node's.
        'export MEDTRAIN_PROBE_HEAD="$SLURMD_NODENAME"',
        # Until Python listens, the signal must not end the task.
        "trap '' USR1",
        f"{srun} {job_python(config)} {task}",
    ]
    return "\n".join(lines) + "\n"


def run_probe(
    config: RunConfig,
    partition: Mapping[str, str],
    directory: Path,
    console: Console,
    *,
    wait_s: float,
    paths: list[str],
) -> ProbeResult:
    """Submit the probe, wait for what it finds, and clear away.

    Args:
        config: what jobs ask for, and their environment.
        partition: the fields of the partition it will run in.
        directory: where runs are kept.
        console: told of the job.
        wait_s: how long it may wait in the queue, in seconds.
        paths: files that the nodes must see.
    """
    nodes = min(TASKS, int(partition.get("TotalNodes", "1") or 1))
    with scratch_directory(nearest_existing(directory)) as scratch, _held(scratch / "lock"):
        result = ProbeResult(nodes=nodes, submitted=time.time())
        where = probe_options(config)
        submit = ["sbatch", "--test-only", *where, "--time=1", "--wrap=true"]
        write_json(
            scratch / "request.json",
            {"paths": paths, "submit": submit, "signal_wait_s": SIGNAL_WAIT_S},
        )
        answer = ask(
            "sbatch",
            "--parsable",
            *where,
            *_shape(nodes),
            f"--output={scratch / 'job.log'}",
            stdin=script(config, scratch),
            environment=without_job_variables(),
            timeout_s=60.0,
        )
        if not answer.ok:
            result.refused = answer.complaint
            return result
        result.job_id = answer.out.strip().split(";")[0]
        try:
            _watch(result, scratch, console, wait_s)
        finally:
            _cancel(result.job_id)
        result.log = _last_line(scratch / "job.log")
        return result


def _shape(nodes: int) -> list[str]:
    return [
        f"--nodes={nodes}",
        f"--ntasks={TASKS}",
        f"--ntasks-per-node={TASKS // nodes}",
        "--cpus-per-task=1",
        f"--mem-per-cpu={_MEMORY_MB_PER_TASK}M",
        f"--time={LIMIT_S // 60}",
        f"--signal=USR1@{SIGNAL_BEFORE_S}",
        "--no-requeue",
        "--job-name=medtrain-doctor",
        "--comment=medtrain:doctor",
    ]


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Hold a lock on this host, for the tasks to see."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _watch(result: ProbeResult, scratch: Path, console: Console, wait_s: float) -> None:
    """Wait until all is told, the job is over, or it waited too long in the queue."""
    began = time.monotonic()
    while len(result.signals) < TASKS:
        before, waited_s = result.state, time.monotonic() - began
        _look_at_job(result)
        if result.state != before:
            message = f"probe job {result.job_id}: {result.state.lower()}"
            console.event("doctor_probe", message, job=result.job_id, state=result.state)
        _read_files(result, scratch)
        if result.state.startswith(_OVER):
            # A file system may show the last files late.
            time.sleep(_POLL_S)
            _read_files(result, scratch)
            return
        if waited_s > wait_s + (0 if result.state == "PENDING" else LIMIT_S + _CANCEL_WAIT_S):
            return
        time.sleep(_POLL_S)


def _read_files(result: ProbeResult, scratch: Path) -> None:
    # Listing the directory asks the server again, where a look-up would trust a cache.
    present = set(os.listdir(scratch))  # noqa: PTH208
    for rank in range(TASKS):
        if rank not in result.tasks and f"task.{rank}.json" in present:
            result.tasks[rank] = read_json(scratch / f"task.{rank}.json")
            result.seen[rank] = time.time()
        if rank not in result.signals and f"signal.{rank}.json" in present:
            result.signals[rank] = read_json(scratch / f"signal.{rank}.json")["after_s"]


def _look_at_job(result: ProbeResult) -> None:
    """Ask for the job's state; where Slurm does not answer for a moment, the old one stands."""
    answer = ask("scontrol", "--oneliner", "show", "job", result.job_id)
    fields = dict(word.split("=", 1) for word in answer.out.split() if "=" in word)
    if "JobState" in fields:
        result.state, result.reason = fields["JobState"], fields.get("Reason", "")
        if fields.get("ExitCode", "0:0") != "0:0":
            result.reason += f", exit code {fields['ExitCode']}"
    elif "invalid job id" in answer.err.lower():
        result.state = _FORGOTTEN


def _cancel(job_id: str) -> None:
    """End the job, and wait until its last process cannot write any more."""
    ask("scancel", "--quiet", job_id)
    until = time.monotonic() + _CANCEL_WAIT_S
    while time.monotonic() < until and ask("squeue", "--noheader", f"--jobs={job_id}").out.strip():
        time.sleep(_POLL_S)


def _last_line(log: Path) -> str:
    if not log.is_file():
        return ""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""
