"""What the probe's files say about the cluster, as findings.

sbatch refused, never started, or left no file → one finding that says so; otherwise one for each
thing that the two tasks looked at.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import medtrain
from medtrain.cluster.checks.all_reduce import judge_ranks
from medtrain.cluster.checks.asking import ChildResult
from medtrain.cluster.checks.filesystem import SKEW_FAIL_S, SKEW_WARN_S, outside
from medtrain.cluster.checks.finding import Finding, failed, passed, skipped, warned
from medtrain.cluster.checks.probe import (
    LIMIT_S,
    SIGNAL_BEFORE_S,
    SIGNAL_WAIT_S,
    TASKS,
    ProbeResult,
)
from medtrain.cluster.checks.probe_task import LINK_RACES
from medtrain.cluster.site import resources_of
from medtrain.config import RunConfig

_NO_SIGNAL = (
    "Jobs would be killed at their time limit without a word: what the journal holds is kept. "
    "Set cluster.time_min well above what a shard takes."
)


def judge_probe(result: ProbeResult, config: RunConfig, directory: Path) -> list[Finding]:
    """Findings of a probe, whatever became of it."""
    if result.refused:
        return [failed("probe job", f"sbatch: {result.refused}",
                       "See cluster.account, partition, qos, constraint and gpus.")]  # fmt: skip
    if not result.tasks:
        return [_no_word(result, directory)]
    hosts = [result.tasks[rank]["host"] for rank in sorted(result.tasks)]
    if len(result.tasks) < TASKS:
        told = f"job {result.job_id}: only {hosts[0]} answered ({result.state}: {result.log})"
        return [failed("probe job", told, "Look at the other node's slurmd and file systems.")]
    return [
        passed("probe job", f"{result.job_id} ran on {', '.join(hosts)}", hosts=hosts),
        *_every_look(result, config, directory),
    ]


def _every_look(result: ProbeResult, config: RunConfig, directory: Path) -> Iterator[Finding]:
    yield _same_software(result, config)
    yield _shared_directory(result, directory)
    yield _promises(result)
    yield _clocks(result)
    yield _gpus(result, config)
    between = "two nodes" if result.nodes > 1 else "two tasks of one node"
    answers = [ChildResult(**result.tasks[rank]["all_reduce"]) for rank in range(TASKS)]
    yield judge_ranks("job all-reduce", answers, between)
    yield _submits(result)
    yield _signal(result)


def _no_word(result: ProbeResult, directory: Path) -> Finding:
    job = f"job {result.job_id}"
    if result.state == "PENDING":
        return warned("probe job", f"{job} did not start in time ({result.reason}); cancelled",
                      "Nothing was found wrong. Run it again when the queue is shorter, or with "
                      "another cluster.partition.", reason=result.reason)  # fmt: skip
    ended = f"{job} ended ({result.state}, {result.reason})"
    if result.log:
        return failed("probe job", f"{ended}: {result.log}",
                      "See cluster.modules, activate, setup, python and container.")  # fmt: skip
    return failed("probe job", f"{ended} and left no file in {directory}",
                  "Compute nodes do not see this directory: set output_dir to a shared file "
                  "system.")  # fmt: skip


def _same_software(result: ProbeResult, config: RunConfig) -> Finding:
    here = (config.cluster.python or sys.executable, str(Path(medtrain.__file__).parent))
    for task in result.tasks.values():
        there = (task["python"], task["package"])
        if there != here and not config.cluster.container:
            return warned("job python", f"{task['host']} runs {there[0]} with {there[1]}, not "
                          f"{here[0]} with {here[1]}", "Set cluster.python or cluster.activate, "
                          "so that jobs run the code you see.")  # fmt: skip
    return passed("job python", f"{here[0]}, medtrain in {here[1]}")


def _shared_directory(result: ProbeResult, directory: Path) -> Finding:
    for task in result.tasks.values():
        if task["missing"]:
            return failed("job files", f"{task['host']} does not see {', '.join(task['missing'])}",
                          "Put it on a file system that compute nodes mount.")  # fmt: skip
    return passed("job files", f"every node reads and writes {directory}")


def _promises(result: ProbeResult) -> Finding:
    """Locks and hard links between nodes."""
    unseen = [task["host"] for task in result.tasks.values() if not task["lock_is_shared"]]
    if unseen:
        return warned("job locks", f"{', '.join(unseen)} takes a lock that this host holds",
                      "flock is local to each node: start a run from one login node "
                      "only, or mount with cluster-wide locks (Lustre: -o flock).")  # fmt: skip
    won = [task["links_won"] for task in result.tasks.values()]
    if None in won:
        return skipped("job locks", "locks hold between nodes; no hard links to race for")
    if sum(won) != LINK_RACES:
        return failed("job locks", f"{LINK_RACES} names were taken {sum(won)} times by two nodes",
                      "Hard links are not atomic here: choose another output_dir.")  # fmt: skip
    return passed("job locks", f"locks hold, {LINK_RACES} of {LINK_RACES} names had one winner")


def _clocks(result: ProbeResult) -> Finding:
    """Between the nodes as the all-reduce measured it, to the login node by files' times."""
    between = max(
        (task["all_reduce"]["value"].get("clock_skew_s", 0.0) for task in result.tasks.values()),
        default=0.0,
    )
    login = max(
        (abs(outside(task["now"], result.submitted, result.seen[rank]))
         for rank, task in result.tasks.items()),
        default=0.0,
    )  # fmt: skip
    server = max(abs(task["server_ahead_s"]) for task in result.tasks.values())
    facts = {"between_nodes_s": between, "login_s": round(login, 3), "server_s": round(server, 3)}
    shown = f"{between:.2f} s between tasks, {login:.2f} s to this host, {server:.2f} s to files"
    worst = max(facts.values())
    if worst > SKEW_WARN_S:
        kind = failed if worst > SKEW_FAIL_S else warned
        return kind("job clocks", shown, "Have NTP (chrony) set the nodes' clocks.", **facts)
    return passed("job clocks", shown, **facts)


def _gpus(result: ProbeResult, config: RunConfig) -> Finding:
    wanted = resources_of(config, "sft").gpus or 0
    counts = {task["host"]: len(task["gpus"]) for task in result.tasks.values()}
    shown = ", ".join(f"{host}: {count}" for host, count in counts.items())
    if not wanted:
        return skipped("job gpus", f"training asks for none ({shown} seen)", seen=counts)
    if not all(counts.values()):
        given = next(iter(result.tasks.values()))["visible_devices"]
        return failed("job gpus", f"asked for, but nvidia-smi shows {shown} "
                      f"(CUDA_VISIBLE_DEVICES={given})", "Look at cluster.partition and "
                      "cluster.gpus, and at the driver of the node.", seen=counts)  # fmt: skip
    return passed("job gpus", shown, seen=counts)


def _submits(result: ProbeResult) -> Finding:
    complaint = result.tasks[0]["submits"]
    if not complaint:
        return passed(
            "job sbatch", "jobs may submit jobs: missing shards are repaired by themselves"
        )
    return warned("job sbatch", f"jobs may not submit jobs: {complaint}",
                  "Where shards are missing, `medtrain resume RUN` on a login node submits them "
                  "again.")  # fmt: skip


def _signal(result: ProbeResult) -> Finding:
    """Whether the announced signal reached the tasks, and how long before the limit."""
    after = [result.signals.get(rank) for rank in range(TASKS)]
    arrived = [seconds for seconds in after if seconds is not None]
    if len(arrived) < TASKS:
        return warned("job signal", f"USR1@{SIGNAL_BEFORE_S} reached {len(arrived)} of {TASKS} "
                      f"tasks within {SIGNAL_WAIT_S:g} s", _NO_SIGNAL)  # fmt: skip
    before = LIMIT_S - max(arrived)
    return passed(
        "job signal",
        f"USR1, asked for {SIGNAL_BEFORE_S} s before the limit, came about {before:.0f} s before",
        before_limit_s=round(before, 1),
    )
