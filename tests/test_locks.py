"""Who may work in a run directory at a time."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from medtrain.errors import TryAgainError
from medtrain.run import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "r")
    run.create()
    return run


def test_one_process_computes_and_the_others_are_told(run: Run) -> None:
    with (
        run.lock(),
        pytest.raises(TryAgainError, match=f"process {os.getpid()}"),
        run.lock(wait_s=0.1),
    ):
        raise AssertionError
    with run.lock():
        pass


def test_submitting_and_computing_are_two_things(run: Run) -> None:
    with run.lock(), run.submitting():
        pass


def test_a_file_system_without_locks_is_worked_on_all_the_same(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*args: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with run.lock(), run.submitting():
        pass
