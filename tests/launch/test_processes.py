"""Signals: processes save as long as they need, end when nobody waits for them, and never stay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

LAUNCHER = """
import os, sys
from medtrain.errors import MedtrainError
from medtrain.launch import processes
from medtrain.launch.command import Node, environment
from medtrain.launch.meeting import Meeting
from medtrain.launch.place import NodePlace

processes.SAME_REQUEST_S = float(sys.argv[1])
surroundings = environment(Node(NodePlace(), 2, 0), Meeting("ddp"))
try:
    code = processes.Processes(sys.argv[2:], surroundings, None).run()
except MedtrainError as error:
    sys.exit(error.exit_code)
print("code", code)
sys.exit(code and 1)
"""
WORKER = """
import os, sys, time
from pathlib import Path
from medtrain.launch.worker import begin

begin()
here, stop = Path(sys.argv[1]), Path(os.environ["MEDTRAIN_STOP_FILE"])
rank = os.environ.get("RANK", "0")
name = here / f"began.{rank}"
name.with_suffix(".tmp").write_text(f"{os.getpid()} {os.getppid()}")
name.with_suffix(".tmp").rename(name)
while not stop.exists() or sys.argv[2] == "deaf":
    time.sleep(0.05)
time.sleep(float(sys.argv[2]))
(here / f"saved.{rank}").touch()
while len(list(here.glob("saved.*"))) < int(os.environ.get("WORLD_SIZE", "1")):
    time.sleep(0.05)
sys.exit(75)
"""


class Launched:
    """A launcher with its processes, started from a test."""

    def __init__(self, here: Path, manner: str, same_request_s: float, *, torchrun: bool) -> None:
        self.here, self.count = here, 2 if torchrun else 1
        (here / "launcher.py").write_text(LAUNCHER)
        (here / "worker.py").write_text(WORKER)
        start = ["-m", "torch.distributed.run", "--nproc_per_node=2"] if torchrun else []
        program = [sys.executable, *start, str(here / "worker.py"), str(here), manner]
        command = [sys.executable, str(here / "launcher.py"), str(same_request_s), *program]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        until(lambda: len(list(here.glob("began.?"))) == self.count)
        both = [path.read_text().split() for path in sorted(here.glob("began.?"))]
        self.workers = [int(pid) for pid, _ in both]
        self.parent = int(both[0][1])
        """Of the workers: torchrun, or the launcher."""

    def tell(self, number: signal.Signals, *others: int) -> None:
        for process in (self.process.pid, *others):
            os.kill(process, number)

    def end(self) -> tuple[int, str]:
        said, _ = self.process.communicate(timeout=100)
        return self.process.returncode, said.strip()

    @property
    def saved(self) -> int:
        return len(list(self.here.glob("saved.*")))


def until(true: Callable[[], bool], seconds: float = 100) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.05)


def is_gone(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    made: list[Launched] = []

    def start(manner: str, same_request_s: float = 60.0, *, torchrun: bool = False) -> Launched:
        made.append(Launched(tmp_path, manner, same_request_s, torchrun=torchrun))
        return made[-1]

    yield start
    for one in made:
        for process in (one.process.pid, *one.workers):
            if not is_gone(process):
                os.kill(process, signal.SIGKILL)
        one.process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_has_the_process_save_and_end(
    launched: Callable[..., Launched], number: signal.Signals
) -> None:
    one = launched("0.5")
    one.tell(number)
    assert one.end() == (1, "code 75")
    assert one.saved == 1


def test_a_signal_to_every_process_of_a_step_ends_none_before_it_has_saved(
    launched: Callable[..., Launched],
) -> None:
    two = launched("1", torchrun=True)
    assert two.parent != two.process.pid
    for _ in range(2):  # from Slurm, and passed on by srun
        two.tell(signal.SIGTERM, two.parent, *two.workers)
    assert two.end() == (1, "code 1")  # torchrun's own; the stage's failure names the true one
    assert two.saved == 2


def test_a_signal_that_comes_again_later_ends_what_does_not_save(
    launched: Callable[..., Launched],
) -> None:
    two = launched("deaf", 0.0, torchrun=True)
    two.tell(signal.SIGTERM)
    time.sleep(0.2)  # two signals at once are one
    two.tell(signal.SIGTERM)
    assert two.end() == (75, "")
    assert two.saved == 0
    until(lambda: all(map(is_gone, two.workers)))


def test_in_a_job_it_is_slurm_that_ends_what_does_not_save(
    launched: Callable[..., Launched], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    one = launched("1", 0.0)
    one.tell(signal.SIGUSR1)
    time.sleep(0.2)
    one.tell(signal.SIGTERM)
    assert one.end() == (1, "code 75")
    assert one.saved == 1


def test_an_interrupt_ends_everything_at_once(launched: Callable[..., Launched]) -> None:
    two = launched("deaf", torchrun=True)
    two.tell(signal.SIGINT)
    code, _ = two.end()
    assert code != 0
    assert all(map(is_gone, (two.parent, *two.workers)))
    assert two.saved == 0


@pytest.mark.parametrize("victim", ["launcher", "torchrun"])
def test_processes_end_with_whoever_started_them(
    launched: Callable[..., Launched], victim: str
) -> None:
    two = launched("deaf", torchrun=True)
    os.kill(two.process.pid if victim == "launcher" else two.parent, signal.SIGKILL)
    until(lambda: all(map(is_gone, (two.parent, *two.workers))))
    assert two.end() == ((-signal.SIGKILL, "") if victim == "launcher" else (1, "code -9"))


def test_when_one_fails_the_other_is_not_waited_for(launched: Callable[..., Launched]) -> None:
    two = launched("deaf", torchrun=True)
    os.kill(two.workers[0], signal.SIGKILL)
    assert two.end() == (1, "code 1")
    assert is_gone(two.workers[1])
    assert two.saved == 0


def test_a_process_whose_launcher_is_gone_does_not_begin(tmp_path: Path) -> None:
    code = "from medtrain.launch.worker import begin; begin()"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    surroundings = {**os.environ, "MEDTRAIN_LAUNCHER_PID": str(ended.pid)}
    done = subprocess.run([sys.executable, "-c", code], env=surroundings, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert "has ended" in done.stderr
