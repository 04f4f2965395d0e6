"""The acceptance tests of a GPU: what each of them needs, and what they share.

    pytest -m gpu -n 0 tests/gpu                              on a card, within five minutes
    MEDTRAIN_GPU_TESTS_ON_CPU=1 pytest -m gpu -n 0 tests/gpu  what can run without one, tiny

One prepared run is copied for every command. Commands that tests wait for are started when the
first test begins, so that they run beside what is computed in this process.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.commands import Commands, Done
from tests.gpu.size import FULL, TINY, Size

BENCH = Path(__file__).parents[2] / "bench"
ON_CPU = os.environ.get("MEDTRAIN_GPU_TESTS_ON_CPU") == "1"
_WHOLE: pytest.StashKey[list[Future[Done]]] = pytest.StashKey()
_STARTED_EARLY = ("whole_run", "loss_runs", "stopped_runs", "expandable_run")


def has_card() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None or has_card():
        return
    if not ON_CPU:
        pytest.skip("no CUDA card here, or not `pytest -m gpu`")


@pytest.fixture
def card() -> Any:
    """For tests that nothing but a card can run."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA card")
    return torch.device("cuda", 0)


@pytest.fixture(scope="session")
def device() -> Any:
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """What a module has put on the card is no part of what the next one measures."""
    yield
    gc.collect()
    if has_card():
        import torch

        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def size() -> Size:
    return FULL if has_card() else TINY


@pytest.fixture(scope="session")
def commands(size: Size, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """The prepared run, and what is done with copies of it."""
    with Commands(tmp_path_factory.mktemp("gpu"), size).open() as opened:
        yield opened


@pytest.fixture(scope="session", autouse=True)
def started_early(request: pytest.FixtureRequest) -> None:
    runnable = has_card() or ON_CPU
    asked = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    for name in _STARTED_EARLY:
        if runnable and name in asked:
            request.getfixturevalue(name)
    if has_card() and "whole_run" in asked:
        # Last: nobody waits for it.
        beside = request.getfixturevalue("commands").whole_on_cpu()
        request.config.stash[_WHOLE].append(beside)


@pytest.fixture(scope="session")
def whole_run(commands: Commands, request: pytest.FixtureRequest) -> Any:
    """The whole quickstart, in 16 bits with an NF4 base; a future."""
    whole = commands.whole()
    request.config.stash[_WHOLE] = [whole]
    return whole


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say how long the quickstart took; nothing depends on it."""
    sides = ("in bfloat16 on this device", "in float32 on the CPU beside it, 2 threads")
    for side, run in zip(sides, config.stash.get(_WHOLE, []), strict=False):
        ended = run.done() and not run.cancelled() and run.exception() is None
        took = f"{run.result().seconds:.0f} s" if ended and not run.result().code else "not ended"
        terminalreporter.write_line(f"whole quickstart {side}: {took}")


@pytest.fixture(scope="session")
def loss_runs(commands: Commands) -> Any:
    """The same steps of SFT on the CPU and on the device, by the name of each."""
    return commands.same_steps()


@pytest.fixture(scope="session")
def stopped_runs(commands: Commands) -> Any:
    """SFT twice undisturbed, and once stopped by SIGTERM and gone on with."""
    return commands.stopped()


@pytest.fixture(scope="session")
def expandable_run(commands: Commands) -> Any:
    return commands.expandable()
