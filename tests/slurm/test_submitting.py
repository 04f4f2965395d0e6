"""Submitting a chain: once, whoever else submits it, and whoever dies in the middle of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from medtrain.cluster.ledger import Ledger
from medtrain.cluster.slurm import Slurm
from medtrain.cluster.submit import submit_chain
from medtrain.config import load_config
from medtrain.console import Console
from medtrain.selection import Selection
from tests.judge.endpoint import Answer, Body, fails, serving, verdict
from tests.slurm.chain import ARRAY, CLOSE, SMALL_JOBS, Chain, ready_to_judge, undisturbed
from tests.slurm.chain import write_config as write_tree
from tests.slurm.cluster import Cluster
from tests.slurm.judge_server import JudgeServer, judge_server
from tests.small_run import medtrain

pytestmark = pytest.mark.slurm
OPEN = "judge.verdicts.open"


@pytest.fixture(scope="module")
def expected(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed run with the rules judge collects."""
    return undisturbed(tmp_path_factory.mktemp("undisturbed"), cluster)


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with judge_server() as server:
        yield server


@pytest.fixture
def held(tmp_path: Path, cluster: Cluster) -> Iterator[Chain]:
    """A whole run whose jobs are held as they are submitted: nothing starts."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "What is gout?", "answer": "A disease."}\n')
    tree = {
        "name": f"held-{uuid.uuid4().hex[:8]}",
        "output_dir": str(tmp_path),
        "model": {"base": "builtin:tiny"},
        "data": {"sources": [{"adapter": "table", "path": str(rows)}]},
        "judge": {"kind": "rules", "num_shards": 2},
        "generate": {"num_shards": 3},
        "cluster": {**SMALL_JOBS, "sbatch": {"hold": True}},
    }
    chain = Chain(write_tree(tmp_path / "held.yaml", tree), cluster)
    yield chain
    cluster.cancel_all(chain.run.name)


def names_of(chain: Chain) -> Counter[str]:
    """How often each job of the chain is in the queue; an array once, whatever its tasks."""
    ids = {(job.job_id.partition("_")[0], job.name) for job in chain.queued()}
    return Counter(name.removeprefix(f"{chain.run.name}-") for _, name in ids)


def queued_by(said: str) -> int:
    """How many jobs a submission says that it queued."""
    found = re.search(r"(\d+) jobs? queued|nothing to queue", said)
    assert found, said
    return int(found[1] or 0)


# Who else submits


def test_two_submit_at_the_same_moment(tmp_path: Path, cluster: Cluster, expected) -> None:
    chains = [ready_to_judge(tmp_path / str(n), cluster) for n in range(3)]
    for chain in chains:
        command = [sys.executable, "-m", "medtrain", "submit", chain.config, *chain.selection]
        both = [
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for _ in range(2)
        ]
        said = [process.communicate()[0] for process in both]
        assert [process.returncode for process in both] == [0, 0], said
        assert sorted(map(queued_by, said)) == [0, 3]
    for chain in chains:
        chain.wait_done()
        assert chain.collected() == expected
        assert [chain.rounds(key) for key in (OPEN, ARRAY, CLOSE)] == [1, 1, 1]


def test_what_is_queued_is_not_queued_again(held: Chain) -> None:
    everything = queued_by(held.submit())
    assert everything == len(names_of(held)) == 15
    assert "nothing to queue" in held.submit()
    assert names_of(held).most_common(1)[0][1] == 1
    # A part of it, and more of it, is queued as well.
    assert "nothing to queue" in held.submit("--from", "judge", "--until", "pairs")


def test_exactly_what_was_cancelled_is_queued_again(held: Chain, cluster: Cluster) -> None:
    held.submit("--until", "pairs")
    before = {key: held.job(key) for key in names_of(held)}
    cluster.run("scancel", held.job(CLOSE))
    assert queued_by(held.submit("--until", "pairs")) == 1
    assert names_of(held) == Counter(before.keys())
    assert [key for key in before if held.job(key) != before[key]] == [CLOSE]
    # What waits for the success of a job in the middle is lost with it.
    cluster.run("scancel", held.job("merge-sft"))
    assert queued_by(held.submit("--until", "pairs")) == len(before) - 2
    assert names_of(held) == Counter(before.keys())
    assert held.rounds("prepare") == held.rounds("sft") == 1
    assert "nothing to queue" in held.submit("--until", "pairs")


def test_another_configuration_while_jobs_are_queued(held: Chain) -> None:
    held.submit("--until", "sft")
    before = held.run.config.read_bytes(), names_of(held)
    said = held.medtrain("submit", held.config, "sft.epochs=9", expect=75)
    assert f"medtrain cancel {held.run.root}" in said
    assert (held.run.config.read_bytes(), names_of(held)) == before
    # Where it is computed may change: it changes no result.
    assert queued_by(held.submit("--until", "sft", "cluster.time_min=20")) == 0


def test_forcing_a_stage_that_is_queued(held: Chain) -> None:
    held.submit("--until", "sft")
    said = held.medtrain("submit", held.config, "--force", "sft", expect=75)
    assert "medtrain cancel" in said
    assert held.rounds("sft") == 1


def test_a_stage_whose_predecessor_is_neither_done_nor_queued(held: Chain) -> None:
    said = held.medtrain("submit", held.config, "--from", "judge", expect=65)
    assert "judge needs" in said
    assert not names_of(held)


# Cancelled and taken up again


def test_cancel_then_resume(tmp_path: Path, cluster: Cluster, server: JudgeServer) -> None:
    judge = server.settings(num_shards=3)
    wanted = undisturbed(tmp_path / "undisturbed", cluster, judge=judge)
    server.asked.clear()
    chain = ready_to_judge(tmp_path / "run", cluster, judge=judge)
    server.hold(["q5"])
    chain.submit()
    server.clients(1)
    finished = server.asked.copy()
    said = chain.medtrain("cancel", chain.run.root)
    assert f"medtrain resume {chain.run.root}" in said
    server.release()
    # At once: the cancelled task is still being cleared away.
    chain.medtrain("resume", chain.run.root)
    chain.wait_done()
    assert chain.collected() == wanted
    assert all(server.asked[row] == 1 for row in finished if row != "q5"), "finished rows stand"
    assert "nothing to queue" in chain.medtrain("resume", chain.run.root)


def test_a_cancelled_training_stays_cancelled(tmp_path: Path, cluster: Cluster) -> None:
    """A training that is told to stop has itself queued again; not one that a person cancelled."""
    busy, started = tmp_path / "busy-python", tmp_path / "started"
    # A stand-in for the training itself, which runs until it is told to stop.
    busy.write_text(
        f'#!/bin/bash\nif [[ "$3" == sft ]]; then touch {started}; exec sleep 300; fi\n'
        f'exec {sys.executable} "$@"\n'
    )
    busy.chmod(0o755)
    chain = ready_to_judge(tmp_path, cluster, resources={"python": str(busy)})
    chain.medtrain("submit", chain.config, "--only", "sft", "--force", "sft")
    chain.wait_until(started.exists, "the training runs")
    chain.medtrain("cancel", chain.run.root)
    chain.wait_ended()
    shown = cluster.run("scontrol", "show", "job", chain.job("sft"))
    assert "JobState=CANCELLED" in shown, shown
    assert "Restarts=0" in shown
    again = queued_by(chain.medtrain("resume", chain.run.root))
    assert again == 1, "and no more than was asked for"
    assert names_of(chain) == Counter(["sft"])
    cluster.cancel_all(chain.run.name)


def test_resume_at_once_after_the_cancel_of_a_plain_job(
    tmp_path: Path, cluster: Cluster, expected
) -> None:
    """A cancelled job takes seconds to go; what is queued meanwhile must not wait for its
    success."""
    waits = f"while [ -e {tmp_path}/wait ]; do sleep 0.1; done"
    chain = ready_to_judge(tmp_path, cluster, resources={"setup": [waits]})
    (tmp_path / "wait").touch()
    chain.submit()
    chain.wait_until(lambda: any(job.state == "RUNNING" for job in chain.queued()), "it runs")
    chain.medtrain("cancel", chain.run.root)
    (tmp_path / "wait").unlink()
    chain.medtrain("resume", chain.run.root)
    chain.wait_done()
    assert chain.collected() == expected


# Who dies


@contextmanager
def dying_in_sbatch(
    directory: Path, call: int, *, submits: bool, afterwards: str = ""
) -> Iterator[dict[str, str]]:
    """An sbatch whose `call`-th call kills the medtrain that called it: after the real one has
    taken the job, or before; then, with `afterwards`, it does that and submits all the same."""
    real = shutil.which("sbatch")
    directory.mkdir()
    wrapper = directory / "sbatch"
    wrapper.write_text(
        f"#!/bin/bash\ncd {directory}\ncalls=$(ls | grep -c ^call-); touch call-$calls\n"
        f'if (( calls + 1 != {call} )); then cd "$OLDPWD"; exec {real} "$@"; fi\n'
        f'cd "$OLDPWD"; {f"{real} " if submits else ": "}"$@" >/dev/null; kill -KILL $PPID\n'
        + (f'{afterwards} {real} "$@" >/dev/null\n' if afterwards else "")
    )
    wrapper.chmod(0o755)
    yield {"PATH": f"{directory}:{os.environ['PATH']}"}


@pytest.mark.parametrize("submits", [True, False], ids=["after sbatch", "before sbatch"])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_submitter_that_is_killed(
    call: int, submits: bool, tmp_path: Path, cluster: Cluster, expected
) -> None:
    chain = ready_to_judge(tmp_path / "run", cluster)
    with dying_in_sbatch(tmp_path / "bin", call, submits=submits) as environment:
        killed = medtrain("submit", chain.config, *chain.selection, **environment)
    assert killed.returncode == -9, killed.stdout + killed.stderr
    assert len(Ledger(chain.run).all()) == call
    chain.submit()
    queue = names_of(chain)
    assert max(queue.values()) == 1, queue
    chain.wait_done()
    assert chain.collected() == expected
    orphans = [s for s in Ledger(chain.run).all() if not s.job_ids]
    assert len(orphans) <= 1


def test_an_sbatch_that_outlives_its_submitter(tmp_path: Path, cluster: Cluster, expected) -> None:
    """The job comes into being when the next submission has begun to look for it."""
    chain = ready_to_judge(tmp_path / "run", cluster)
    with dying_in_sbatch(tmp_path / "bin", 2, submits=False, afterwards="sleep 3; ") as environment:
        killed = medtrain("submit", chain.config, *chain.selection, **environment)
    assert killed.returncode == -9, killed.stdout + killed.stderr
    chain.submit()
    queue = names_of(chain)
    assert max(queue.values()) == 1, queue
    chain.wait_done()
    assert chain.collected() == expected


def test_a_second_chain_is_not_confused_by_what_the_first_one_did(
    tmp_path: Path, cluster: Cluster
) -> None:
    """The stage behind a queued one is queued too, although an older chain has done it once."""
    chain = ready_to_judge(tmp_path / "run", cluster)
    chain.submit()
    chain.wait_done()
    before = chain.collected()
    other = ["judge.orders=single"]
    said = medtrain("submit", chain.config, *other, "--only", "judge")
    assert said.returncode == 0, said.stderr
    said = medtrain("submit", chain.config, *other, *chain.selection)
    assert said.returncode == 0, said.stderr
    assert "nothing to queue" not in said.stdout
    chain.wait_done()
    assert chain.collected() != before
    assert '"state": "done"' in medtrain("status", chain.run.root, "--json").stdout


def test_a_training_of_a_killed_submitter_is_taken_over(held: Chain, tmp_path: Path) -> None:
    with dying_in_sbatch(tmp_path / "bin", 2, submits=True) as environment:
        killed = medtrain("submit", held.config, "--until", "merge-sft", **environment)
    assert killed.returncode == -9
    assert set(names_of(held)) == {"prepare", "sft"}
    assert queued_by(held.submit("--until", "merge-sft")) == 1
    assert names_of(held) == Counter(["prepare", "sft", "merge-sft"])
    assert held.rounds("sft") == 1, "the job that there was"
    jobs = [job for job in held.queued() if job.name.endswith("-sft") and "merge" not in job.name]
    assert [job.job_id for job in jobs] == [held.job("sft")]


# Limits of the cluster


def test_an_array_above_the_limit_is_split(
    tmp_path: Path, cluster: Cluster, expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = ready_to_judge(tmp_path, cluster)
    monkeypatch.setattr(Slurm, "max_array_size", lambda self: 2)
    loaded = load_config(chain.config)
    submit_chain(chain.run, loaded, Console(quiet=True), Selection("judge", "pairs"))
    array = chain.submission(ARRAY)
    assert (len(array.job_ids), array.starts) == (2, (0, 2))
    chain.wait_done()
    assert chain.collected() == expected
    assert chain.rounds(ARRAY) == 1, "each half found its shards"


def test_a_thousand_shards_stay_below_the_clusters_limit(tmp_path: Path, cluster: Cluster) -> None:
    chain = ready_to_judge(tmp_path, cluster, judge={"num_shards": 1100})
    shown = chain.submit("--dry-run")
    assert re.findall(r"#SBATCH --array=(\d+-\d+)", shown) == ["0-1000", "0-98"]


# The controller is away


def test_the_controller_is_away_during_a_watch(
    tmp_path: Path, cluster: Cluster, server: JudgeServer
) -> None:
    chain = ready_to_judge(tmp_path, cluster, judge=server.settings(num_shards=3))
    server.hold(["q5"])
    with cluster.exclusive():
        chain.submit()
        server.clients(1)
        log = tmp_path / "watch.log"
        with log.open("w") as out:
            watch = subprocess.Popen(
                [sys.executable, "-m", "medtrain", "watch", chain.run.root, "--every", "1"],
                stdout=out, stderr=subprocess.STDOUT,
            )  # fmt: skip
        try:
            chain.wait_until(lambda: "stage=judge" in log.read_text(), "the watch shows the stage")
            cluster.stop_controller()
            away = time.monotonic()
            chain.wait_until(lambda: "not answer" in log.read_text(), "it says so", 40)
            while time.monotonic() - away < 20:
                assert watch.poll() is None, log.read_text()
                time.sleep(0.5)
            # What needs Slurm says that it is Slurm.
            said = chain.medtrain("cancel", chain.run.root, expect=75)
            assert "Slurm does not answer" in said
            cluster.start_controller()
            server.release()
            chain.wait_done(seconds=90)
            watch.wait(60)
        finally:
            watch.kill()
            watch.wait()
    said = log.read_text()
    assert "Traceback" not in said
    assert re.search(r"stage=pairs.*state=done", said), said


# Two writers


def test_two_writers_of_every_shard(tmp_path: Path, cluster: Cluster, server: JudgeServer) -> None:
    judge = server.settings(num_shards=2)
    wanted = undisturbed(tmp_path / "undisturbed", cluster, judge=judge)
    chain = ready_to_judge(tmp_path / "run", cluster, judge=judge)
    server.hold(["q5", "q15"])
    chain.submit()
    server.clients(2)
    second = subprocess.Popen(
        [sys.executable, "-m", "medtrain", "job", "shards", "judge", str(chain.run.root)]
    )
    chain.wait_until(lambda: attempts_at_most_busy_shard(chain) == 2, "both work on one shard")
    server.release()
    assert second.wait(60) == 0
    chain.wait_done()
    assert chain.collected() == wanted
    assert chain.rounds(ARRAY) == 1
    assert not list(chain.run.judge.glob("shards/*/done.json.unsound-*"))


def attempts_at_most_busy_shard(chain: Chain) -> int:
    shards = Counter(path.parent.name for path in chain.run.judge.glob("shards/*/*/"))
    return max(shards.values(), default=0)


# The disk


def inside_of(cluster: Cluster, node: str) -> list[str]:
    """What comes before a command that runs in a node's namespaces."""
    unshare = (cluster.root / "run" / node).read_text().split()[0]
    first = Path(f"/proc/{unshare}/task/{unshare}/children").read_text().split()[0]
    return ["nsenter", f"--target={first}", "--mount", "--pid", "--"]


@contextmanager
def small_disk(directory: Path, cluster: Cluster, size_mb: int) -> Iterator[Path]:
    """A file system of a few MB that this machine and all nodes see: a node has mounts of its own,
    so each of them mounts the same device."""
    place, image = directory / "disk", directory / "disk.img"
    place.mkdir()
    with image.open("wb") as handle:
        handle.truncate(size_mb << 20)
    if not all(map(shutil.which, ("mkfs.ext4", "losetup", "nsenter"))):
        pytest.skip("mkfs.ext4, losetup or nsenter is not installed")
    format_ = ["mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", "-N", "2000", image]
    subprocess.run(format_, check=True)
    looped = subprocess.run(["losetup", "-f", "--show", image], capture_output=True, text=True)
    if looped.returncode:
        pytest.skip(f"this machine has no loop devices: {looped.stderr.strip()}")
    device = looped.stdout.strip()
    everywhere = [[], *(inside_of(cluster, node) for node in cluster.nodes)]
    mounted = []
    try:
        for inside in everywhere:
            subprocess.run([*inside, "mount", device, place], check=True)
            mounted.append(inside)
        yield place
    finally:
        for inside in mounted:
            subprocess.run([*inside, "umount", "--lazy", place], check=False)
        subprocess.run(["losetup", "-d", device], check=False)


def test_a_full_disk(tmp_path: Path, cluster: Cluster, server: JudgeServer) -> None:
    """The chain ends with one command; run when there is space again, it finishes."""
    judge = server.settings(num_shards=3)
    wanted = undisturbed(tmp_path / "undisturbed", cluster, judge=judge)
    server.asked.clear()
    with cluster.exclusive(), small_disk(tmp_path, cluster, 8) as disk:
        chain = ready_to_judge(disk, cluster, judge=judge, resources={"repair_rounds": 1})
        server.hold(f"q{n}" for n in range(12, 24))
        chain.submit()
        server.clients(3)
        filler = disk / "filler"
        with suppress(OSError), filler.open("wb", buffering=0) as handle:
            while True:
                handle.write(b"\0" * 512)
        server.release()
        chain.wait_ended()
        assert not chain.is_done("pairs")
        status = chain.status()
        filler.unlink()
        finished = server.asked.copy()
        chain.type(status["next_command"])
        chain.wait_done()
        assert chain.collected() == wanted
        assert all(finished[row] <= 3 for row in finished)


# Secrets

IN_SHELL, IN_FILE = "sk-planted-in-the-shell-1", "sk-planted-in-the-file-22"


@pytest.mark.parametrize("place", ["shell", "file"])
def test_the_key_reaches_the_endpoint_and_no_file(
    place: str, tmp_path: Path, cluster: Cluster
) -> None:
    """Of two keys, one is asked for; the endpoint gets it, and first refuses and repeats it."""
    key = {"shell": IN_SHELL, "file": IN_FILE}[place]

    def answer(body: Body, number: int) -> Answer:
        return fails(400, f"no such model for {key}") if number == 0 else verdict("first")

    secrets = tmp_path / "keys.env"
    secrets.write_text(f"KEY_IN_FILE={IN_FILE}\n")
    secrets.chmod(0o600)
    variable = {"shell": "KEY_IN_SHELL", "file": "KEY_IN_FILE"}[place]
    with serving(answer) as endpoint:
        judge = {"kind": "openai", "model": "m", "base_url": endpoint.url, "concurrency": 1,
                 "api_key_env": variable, "max_retries": 0, "orders": "single",
                 "max_failed_fraction": 0.5, "num_shards": 2}  # fmt: skip
        chain = ready_to_judge(
            tmp_path / "run", cluster, rows=6, judge=judge,
            resources={"secrets_file": str(secrets)},
        )  # fmt: skip
        chain.environment["KEY_IN_SHELL"] = IN_SHELL
        shown = [chain.submit("--dry-run"), chain.submit()]
        for job in (OPEN, ARRAY, CLOSE):
            shown.append(cluster.run("scontrol", "--details", "show", "job", chain.job(job)))
        shown.append(cluster.run("squeue", "--Format=all"))
        chain.wait_ended()
        shown.append(chain.evidence())
        shown.append(chain.medtrain("logs", chain.run.root))
    assert set(endpoint.keys) == {f"Bearer {key}"}
    written = [path.read_bytes() for path in chain.run.root.rglob("*") if path.is_file()]
    assert len(written) > 30
    for planted in (IN_SHELL, IN_FILE):
        assert not any(planted.encode() in content for content in written)
        assert not any(planted in text for text in shown)
    names = {path.name for path in chain.run.root.rglob("*")}
    assert not any(planted in name for planted in (IN_SHELL, IN_FILE) for name in names)
