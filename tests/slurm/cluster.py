"""The development cluster as tests see it.

All tests of all pytest workers share one cluster (slurm/dev-cluster.sh): the first that needs it
brings it up, unless it is up already, and the last to leave takes down what tests brought up.
Ordinary tests run side by side, each under a *shared* lock that the conftest takes for it; a test
that breaks something (a node, the controller) does so inside `with cluster.exclusive()`, which
waits until it is alone and heals the cluster afterwards. The locks are flocks: they end with
their process, however that ends.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

SCRIPT = Path(__file__).parents[2] / "slurm" / "dev-cluster.sh"
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "squeue", "scontrol")

PATIENCE_S = 600.0
"""How long to wait for what is sure to come, however slow the machine is."""

T = TypeVar("T")


class QueuedJob(NamedTuple):
    """One line of squeue; an array is one line a task."""

    job_id: str
    name: str
    partition: str
    state: str
    reason: str
    nodes: str


def why_no_cluster() -> str | None:
    """The reason why tests cannot have a Slurm here, or None."""
    search = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    missing = [program for program in PROGRAMS if shutil.which(program, path=search) is None]
    if missing:
        return f"no Slurm here: {', '.join(missing)} not installed (see slurm/dev-cluster.sh)"
    if os.geteuid() != 0:
        return "the development cluster needs root"
    return None


class Cluster:
    """The development cluster: `run` asks it, `crash` and its like break it."""

    nodes = ("node1", "node2", "node3", "node4")

    def __init__(self) -> None:
        exported = self._script("env")  # export SLURM_CONF=<root>/etc/slurm.conf
        self.slurm_conf = Path(exported.strip().partition("=")[2])
        self.root = self.slurm_conf.parents[1]
        locks = Path(tempfile.gettempdir()) / f"{self.root.name}.locks"
        locks.mkdir(exist_ok=True)
        self._users = _open_lock(locks / "users")
        self._door = _open_lock(locks / "door")
        self._room = _open_lock(locks / "room")
        self._shares = 0
        self._brought_up = self.root / "brought-up-by-tests"

    # ---- questions

    def run(self, *command: str) -> str:
        """What a command prints; one that fails raises with all it said."""
        done = subprocess.run(
            command, capture_output=True, text=True, env=self.environment(), check=False
        )
        if done.returncode:
            raise AssertionError(
                f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
            )
        return done.stdout.strip()

    def environment(self) -> dict[str, str]:
        """This process' environment, without what belongs to another Slurm or a test's GPU."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM", "SBATCH_", "SRUN_")) and name != "CUDA_VISIBLE_DEVICES"
        }
        return {**kept, "SLURM_CONF": str(self.slurm_conf)}

    def squeue(self, name_prefix: str = "") -> list[QueuedJob]:
        """The jobs that are queued or running, those of one test if it names them alike."""
        lines = self.run("squeue", "-h", "-r", "-o", "%i|%j|%P|%T|%r|%N").splitlines()
        jobs = [QueuedJob(*line.split("|")) for line in lines]
        return [job for job in jobs if job.name.startswith(name_prefix)]

    def has_sacct(self) -> bool:
        """Whether this cluster keeps accounts (ACCT=db)."""
        return "accounting_storage/slurmdbd" in self.slurm_conf.read_text()

    def wait_until(self, predicate: Callable[[], T], seconds: float, what: str) -> T:
        """The first truthy answer of `predicate`; without one in time, raises with the evidence."""
        deadline = time.monotonic() + seconds
        while not (answer := predicate()):
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {seconds} s: {what}\n{self.evidence()}")
            time.sleep(0.1)
        return answer

    def evidence(self) -> str:
        """Daemons, nodes, queue and the ends of the logs."""
        status = subprocess.run([SCRIPT, "status"], capture_output=True, text=True, check=False)
        parts = [status.stdout + status.stderr]
        for log in sorted((self.root / "log").glob("*.log")):
            tail = log.read_text(errors="replace").splitlines()[-12:]
            parts.append("\n".join([f"--- {log.name}", *tail]))
        return "\n".join(parts)

    # ---- faults

    def crash(self, node: str, *, noticed: bool = True) -> None:
        """Powers a node off with its jobs; not `noticed`, Slurm needs 15 to 30 s to find out."""
        self._script("crash" if noticed else "stop", node)

    def boot(self, node: str) -> None:
        """Powers a node on and waits until it takes jobs."""
        self._script("boot", node)

    def stop_controller(self) -> None:
        """Ends slurmctld; running jobs go on."""
        self._script("stop", "slurmctld")

    def start_controller(self) -> None:
        """Starts slurmctld, which remembers its jobs."""
        self._script("start", "slurmctld")

    def cancel_all(self, name_prefix: str) -> None:
        """Cancels a test's jobs and waits until they are gone."""
        if not name_prefix:
            raise ValueError("an empty prefix would cancel the jobs of other tests")
        if jobs := self.squeue(name_prefix):
            self.run("scancel", *{job.job_id.partition("_")[0] for job in jobs})
        self.wait_until(lambda: not self.squeue(name_prefix), 60, f"{name_prefix}* cancelled")

    # ---- who may do what when

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The cluster is up inside; afterwards, the last user takes down what tests brought up."""
        fcntl.flock(self._users, fcntl.LOCK_SH)
        try:
            with self.shared():  # or a node that a test has just broken would look like a fault
                self._ensure_up()
            yield
        finally:
            fcntl.flock(self._users, fcntl.LOCK_UN)
            self._leave()

    def _ensure_up(self) -> None:
        is_new = not self.slurm_conf.exists()
        try:
            if subprocess.run([SCRIPT, "status"], capture_output=True, check=False).returncode:
                self._script("up")
        except AssertionError:
            if is_new:
                self._script("down")
            raise
        if is_new:
            self._brought_up.touch()

    def _leave(self) -> None:
        try:
            fcntl.flock(self._users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return  # another worker still uses the cluster
        if self._brought_up.exists():
            self._brought_up.unlink()
            self._script("down")
        fcntl.flock(self._users, fcntl.LOCK_UN)

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Nobody breaks the cluster inside; a fixture that outlives a test takes its own."""
        if self._shares == 0:
            with self._through_door():
                fcntl.flock(self._room, fcntl.LOCK_SH)
        self._shares += 1
        try:
            yield
        finally:
            self._shares -= 1
            if self._shares == 0:
                fcntl.flock(self._room, fcntl.LOCK_UN)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Alone on the cluster, free to break it; whatever was broken is healed on leaving."""
        fcntl.flock(self._room, fcntl.LOCK_UN)  # two that kept their share would deadlock
        with self._through_door():
            fcntl.flock(self._room, fcntl.LOCK_EX)
        try:
            yield
        finally:
            self._script("up")
            fcntl.flock(self._room, fcntl.LOCK_SH if self._shares else fcntl.LOCK_UN)

    @contextmanager
    def _through_door(self) -> Iterator[None]:
        """One at a time, so that who waits to be alone is not overtaken by those who share."""
        fcntl.flock(self._door, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._door, fcntl.LOCK_UN)

    def _script(self, *arguments: str) -> str:
        done = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise AssertionError(f"dev-cluster.sh {' '.join(arguments)} failed:\n{done.stderr}")
        return done.stdout


def _open_lock(path: Path) -> IO[str]:
    return path.open("a")
