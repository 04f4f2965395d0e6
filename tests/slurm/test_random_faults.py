"""Rounds of a small array, in which things go wrong at random moments, end with the exact bytes.

A round draws a few faults from its seed: what happens, to which shard or task, and when, told by
the rows that were asked for so far. After the chain has ended by itself or by one `resume`, its
verdicts are those of an undisturbed run. To replay:

    MEDTRAIN_FAULTS_SEED=1234567 pytest -n 0 -s tests/slurm/test_random_faults.py
    MEDTRAIN_FAULTS_ROUND=17 with it replays one round alone.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from medtrain.cluster.submit import resume_chain, submit_chain
from medtrain.config import load_config
from medtrain.console import Console
from medtrain.errors import MedtrainError
from medtrain.judge.stage import phase_of_verdicts
from medtrain.selection import Selection
from medtrain.shards import attempt_units
from tests.judge.endpoint import Answer, Body, Endpoint, says, shown_answers
from tests.slurm.chain import ARRAY, CLOSE, Chain, ready_to_judge, undisturbed
from tests.slurm.cluster import PATIENCE_S, Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
SEED = int(os.environ.get("MEDTRAIN_FAULTS_SEED", "0")) or random.SystemRandom().randrange(1 << 30)
ROUNDS = 50
AT_A_TIME = 4
ROWS = 30
QUIET = Console(quiet=True)
SHARDS_SCRIPT = Path(__file__).parents[2] / "slurm" / "shards.sbatch"


def answer(body: Body, number: int) -> Answer:
    """Which answer wins is told by the answers alone; how long it takes is not."""
    first, second = shown_answers(body)
    verdict = {"justification": "longer", "winner": "first" if len(first) > len(second) else "tie"}
    said = says(json.dumps(verdict))
    said.delay_s = 0.05 + 0.02 * (number % 5)
    return said


@pytest.fixture(scope="module")
def expected(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    endpoint = Endpoint(answer)
    try:
        found = undisturbed(
            tmp_path_factory.mktemp("undisturbed"), cluster, rows=ROWS, judge=judge_at(endpoint)
        )
    finally:
        endpoint.close()
    return found["verdicts.jsonl"]


def judge_at(endpoint: Endpoint, **more: object) -> dict[str, object]:
    return {"kind": "openai", "model": "m", "base_url": endpoint.url, "concurrency": 2,
            "orders": "single", "max_retries": 0, **more}  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and when."""

    name: str
    after_rows: int
    """How many rows have been asked for by then."""
    delay_s: float
    target: int
    """Which shard, task, file or byte; each fault takes what it needs of it."""


class Round:
    """One array, its faults, and what was done to it."""

    def __init__(self, number: int, directory: Path, cluster: Cluster) -> None:
        self.number, self.cluster = number, cluster
        draw = random.Random(SEED * 1_000 + number)
        self.endpoint = Endpoint(answer)
        self.shards = draw.randint(3, 6)
        judge = judge_at(self.endpoint, num_shards=self.shards)
        self.chain: Chain = ready_to_judge(directory, cluster, rows=ROWS, judge=judge)
        self.faults = sorted(self._drawn(draw), key=lambda fault: fault.after_rows)
        self.happened: list[str] = []
        self._over = threading.Event()

    def _drawn(self, draw: random.Random) -> Iterator[Fault]:
        names, weights = zip(*WEIGHTS.items(), strict=True)
        deaths: set[int] = set()
        drawn = draw.choices(names, weights, k=draw.randint(0, 3))
        for name in (names[self.number % len(names)], *drawn):  # each at least once
            fault = Fault(name, draw.randint(0, ROWS), draw.random() * 0.5, draw.randrange(1 << 16))
            if name in DEATHS:
                # A row whose process dies twice running is given up on, which is another test.
                task = fault.target % self.shards
                if task in deaths:
                    continue
                deaths.add(task)
            yield fault

    def play(self) -> bytes:
        """The collected bytes after all that."""
        causing = threading.Thread(target=self._cause_faults)
        try:
            submit_chain(
                self.chain.run, load_config(self.chain.config), QUIET, Selection(only="judge")
            )
            causing.start()
            self._wait_until_nothing_runs()
            self._over.set()
            causing.join()
            for _ in range(3):
                if self.chain.is_done("judge"):
                    break
                self.happened.append("resume")
                resume_chain(self.chain.run, load_config(self.chain.run.config), QUIET)
                self._wait_until_nothing_runs()
            assert self.chain.is_done("judge"), self.chain.evidence()
            return self.chain.run.verdicts.read_bytes()
        finally:
            self._over.set()
            self.endpoint.close()

    def _wait_until_nothing_runs(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while self.chain.queued():
            assert time.monotonic() < deadline, f"{self}\n{self.chain.evidence()}"
            time.sleep(0.4)

    def _cause_faults(self) -> None:
        for fault in self.faults:
            while len(self.endpoint.requests) < fault.after_rows and not self._over.is_set():
                time.sleep(0.05)
            self._over.wait(fault.delay_s)
            what = FAULTS[fault.name](self, fault.target)
            when = f"after {len(self.endpoint.requests)} rows"
            self.happened.append(f"{fault.name} {what} {when}" if what else f"no {fault.name}")

    def __str__(self) -> str:
        return f"round {self.number}, {self.shards} shards: {'; '.join(self.happened)}"

    # ---- what goes wrong

    def kill_task(self, target: int) -> str:
        """SIGKILL of a task's process; where it has not begun, of none."""
        return self._kill(ARRAY, target % self.shards)

    def kill_collect(self, target: int) -> str:
        """SIGKILL of the process that collects, or its job is cancelled before it starts."""
        if target % 2:
            self.cluster.run("scancel", self.chain.job(CLOSE))
            return "cancelled"
        deadline = time.monotonic() + 5
        while not self._over.is_set() and time.monotonic() < deadline:
            if killed := self._kill(CLOSE, None):
                return killed
            time.sleep(0.02)
        return ""

    def _kill(self, key: str, task: int | None) -> str:
        wanted = f"{self.chain.run.root}/jobs/{key}.0"
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if not entry.name.isdigit() or not _is_task(entry, wanted, task):
                    continue
                os.kill(int(entry.name), signal.SIGKILL)
                return f"process {entry.name}"
        return ""

    def requeue_task(self, target: int) -> str:
        return self._tell("requeue", target)

    def cancel_task(self, target: int) -> str:
        return self._tell("cancel", target)

    def _tell(self, what: str, target: int) -> str:
        job = f"{self.chain.job(ARRAY)}_{target % self.shards}"
        command = ["scancel", job] if what == "cancel" else ["scontrol", "requeue", job]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return job if done.returncode == 0 else ""

    def second_writer(self, target: int) -> str:
        """This process computes the shards as well, in another order."""
        config = load_config(self.chain.config)
        units = [("verdicts", shard) for shard in range(self.shards)]
        random.Random(target).shuffle(units)
        with phase_of_verdicts(self.chain.run, config) as phase:
            try:
                attempt_units(phase, units[:2], QUIET)
            except MedtrainError as error:
                return f"refused: {error.message}"
        return str([shard for _, shard in units[:2]])

    def second_array(self, target: int) -> str:
        """Somebody submits the same shards by hand."""
        command = [
            "sbatch", "--parsable", f"--array=0-{target % 2}", "--mem=500", "--cpus-per-task=1",
            f"--job-name={self.chain.run.name}-byhand", "--output=/dev/null", str(SHARDS_SCRIPT),
            "judge", str(self.chain.run.root),
        ]  # fmt: skip
        environment = {**os.environ, "MEDTRAIN_PYTHON": sys.executable}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def truncate_file(self, target: int) -> str:
        return self._damage(target, lambda path: os.truncate(path, path.stat().st_size * 2 // 3))

    def flip_byte(self, target: int) -> str:
        def flip(path: Path) -> None:
            with path.open("r+b") as handle:
                at = target % max(1, path.stat().st_size)
                handle.seek(at)
                byte = handle.read(1) or b"x"
                handle.seek(at)
                handle.write(bytes([byte[0] ^ 0x11]))

        return self._damage(target, flip)

    def delete_file(self, target: int) -> str:
        return self._damage(target, Path.unlink)

    def _damage(self, target: int, how: Callable[[Path], object]) -> str:
        shards = self.chain.run.judge / "shards"
        kind = ("*/*/journal.jsonl", "*/*/rows.jsonl", "*/done.json")[target % 3]
        while not (found := sorted(shards.glob(kind))) and not self._over.is_set():
            time.sleep(0.02)
        if not found:
            return ""
        victim = found[target // 3 % len(found)]
        with suppress(FileNotFoundError):
            how(victim)
        return str(victim.relative_to(shards))


def _is_task(process: Path, folder: str, task: int | None) -> bool:
    """Whether a process is the Python of a job whose folder begins so, and of that array task."""
    words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
    if "submitit.core._submit" not in words or "srun" in words[0]:
        return False
    if not any(word.startswith(folder) for word in words):
        return False
    environment = (process / "environ").read_bytes().split(b"\0")
    return task is None or b"SLURM_ARRAY_TASK_ID=%d" % task in environment


WEIGHTS = {
    "kill_task": 4, "requeue_task": 2, "cancel_task": 3, "second_writer": 2, "second_array": 1,
    "truncate_file": 3, "flip_byte": 4, "delete_file": 3, "kill_collect": 2,
}  # fmt: skip
FAULTS: dict[str, Callable[[Round, int], str]] = {name: getattr(Round, name) for name in WEIGHTS}
DEATHS = {"kill_task", "requeue_task", "cancel_task"}


def test_every_round_ends_with_the_exact_bytes(
    tmp_path: Path, cluster: Cluster, expected: bytes
) -> None:
    only = os.environ.get("MEDTRAIN_FAULTS_ROUND")
    rounds = [int(only)] if only else range(ROUNDS)
    played: list[Round] = []

    def play(number: int) -> str | None:
        round_ = Round(number, tmp_path / str(number), cluster)
        played.append(round_)
        try:
            return None if round_.play() == expected else f"other bytes: {round_}"
        except Exception as error:
            return f"{round_}: {type(error).__name__}: {error}"

    print(f"MEDTRAIN_FAULTS_SEED={SEED}")
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        failed = [found for found in pool.map(play, rounds) if found]
    for round_ in sorted(played, key=lambda r: r.number):
        print(round_)
        cluster.cancel_all(round_.chain.run.name)
    assert not failed, f"MEDTRAIN_FAULTS_SEED={SEED}\n" + "\n\n".join(failed)
    if not only:
        hit = {event.split()[0] for round_ in played for event in round_.happened}
        assert hit >= set(WEIGHTS), f"never happened: {set(WEIGHTS) - hit}"
