"""Calling sbatch, from a login node or from inside a job, and what it says when it refuses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from medtrain.cluster.slurm import unreachable
from medtrain.errors import ConfigError, MedtrainError

# With --parsable: the id, and after a semicolon the cluster. A site's wrapper may say more.
_JOB_ID = re.compile(r"^(\d+)(?:;\S+)?$", re.MULTILINE)
_UNREACHABLE = re.compile(
    r"unable to contact|socket timed out|connection (?:refused|reset)|communication", re.IGNORECASE
)


def flags(options: Mapping[str, str | int | bool]) -> list[str]:
    """Options as arguments of sbatch, by name; those that are true have no value."""
    return [
        f"--{name}" if value is True else f"--{name}={value}"
        for name, value in sorted(options.items())
        if value is not False
    ]


def train_script() -> Path:
    """slurm/train.sbatch, of a checkout or as it was installed.

    Raises:
        MedtrainError: it is in neither place.
    """
    checkout = Path(__file__).parents[2] / "slurm" / "train.sbatch"
    installed = Path(sys.prefix) / "share" / "medtrain" / "slurm" / "train.sbatch"
    for path in (checkout, installed):
        if path.is_file():
            return path
    raise MedtrainError(
        f"slurm/train.sbatch is neither at {checkout} nor at {installed}",
        fix="Install medtrain again.",
    )


def sbatch(command: Sequence[str]) -> str:
    """Run an sbatch command with `--parsable`; the job's id.

    Raises:
        ConfigError: sbatch refuses.
        SlurmUnreachableError: Slurm does not answer.
    """
    with outside_of_a_job():
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    found = _JOB_ID.search(done.stdout)
    if done.returncode or not found:
        raise refused(done.stderr or done.stdout)
    return found[1]


def refused(said: str) -> MedtrainError:
    """sbatch's answer as an error of ours."""
    lines = [line.removeprefix("sbatch: error: ").strip() for line in said.splitlines()]
    words = "; ".join(line for line in lines if line)
    if _UNREACHABLE.search(words):
        return unreachable(f"sbatch says: {words[:400]}")
    return ConfigError(
        f"sbatch refuses the job: {words[:400]}",
        fix="Look at `cluster:` in the configuration and at slurm/site.yaml; a run that exists "
        "keeps its values until `medtrain submit RUN cluster.partition=…` gives others. "
        "`medtrain doctor --cluster` says what the site has.",
    )


@contextmanager
def outside_of_a_job() -> Iterator[None]:
    """The environment of a login node: what Slurm told this job about itself stays out of the next.

    `SLURM_CONF` stays: it says where the cluster is.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_")) and name != "SLURM_CONF"
    }
    for name in kept:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(kept)
