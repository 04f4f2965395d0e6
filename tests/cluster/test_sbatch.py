"""What sbatch answers, in the forms in which sites have it answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from medtrain.cluster.sbatch import sbatch
from medtrain.cluster.slurm import SlurmUnreachableError
from medtrain.errors import ConfigError


def answering(directory: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = directory / "sbatch"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")


@pytest.mark.parametrize(
    "said",
    ["77", "77;north", "Welcome to North!\\nYour budget: 12 h\\n77", "77\\nplease read the news"],
)
def test_the_id_is_found_whatever_a_wrapper_adds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    answering(tmp_path, monkeypatch, f"printf '{said}\\n'")
    assert sbatch(["sbatch", "--parsable", "x"]) == "77"


def test_a_refusal_is_in_sbatchs_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "sbatch: error: invalid partition: gpuu\\nsbatch: error: Batch job submission failed"
    answering(tmp_path, monkeypatch, f"printf '{said}\\n' >&2; exit 1")
    with pytest.raises(ConfigError, match="invalid partition: gpuu; Batch job submission failed"):
        sbatch(["sbatch", "--parsable", "x"])


@pytest.mark.parametrize(
    "said",
    [
        "Unable to contact slurm controller (connect failure)",
        "Socket timed out on send/recv operation",
    ],
)
def test_no_answer_is_no_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    """The job may exist all the same, and trying again may help."""
    answering(tmp_path, monkeypatch, f"echo 'sbatch: error: {said}' >&2; exit 1")
    with pytest.raises(SlurmUnreachableError):
        sbatch(["sbatch", "--parsable", "x"])


def test_a_job_is_submitted_as_from_a_login_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm/slurm.conf")
    answering(tmp_path, monkeypatch, f'echo "$SLURM_JOB_ID/$SLURM_CONF" > {tmp_path}/said; echo 77')
    sbatch(["sbatch", "--parsable", "x"])
    assert (tmp_path / "said").read_text() == "//etc/slurm/slurm.conf\n"
