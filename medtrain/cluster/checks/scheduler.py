"""Slurm as the login node sees it: whether it answers, its limits, and what the config asks for.

commands → scontrol ping (no answer: one finding, and nothing else is asked) → scontrol show config,
show partition, sacct, sacctmgr → findings. Five short questions, nothing is submitted.
"""

from __future__ import annotations

import getpass
import re
import shutil
from collections.abc import Mapping
from typing import NamedTuple, get_args

from medtrain.cluster.checks.asking import ask
from medtrain.cluster.checks.finding import Finding, failed, passed, skipped, warned
from medtrain.cluster.site import resources_of
from medtrain.config import RunConfig
from medtrain.config.cluster import JobKind, Resources

COMMANDS = ("sbatch", "squeue", "scontrol", "sinfo", "srun", "scancel")
_WAY_IN = "Run it on a login node of the cluster; perhaps `module load slurm` or SLURM_CONF is due."

_Partitions = Mapping[str, Mapping[str, str]]


class Slurm(NamedTuple):
    """What the questions gave."""

    findings: list[Finding]
    partitions: _Partitions
    """Fields of `scontrol show partition`, by name; empty where Slurm does not answer."""

    @property
    def answers(self) -> bool:
        """Whether a job may be submitted at all."""
        return bool(self.partitions)


def ask_slurm(config: RunConfig) -> Slurm:
    """Ask everything that needs no job."""
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if missing:
        return _silent(f"no {', '.join(missing)} on this machine", _WAY_IN)
    ping = ask("scontrol", "ping")
    # scontrol exits 0 or 1 by version where the controller is down; its words are the same.
    if not re.search(r"\bUP\b", ping.out):
        fix = f"{_WAY_IN} Else ask the administrator."
        return _silent(f"slurmctld does not answer: {ping.complaint}", fix)
    settings = _settings(ask("scontrol", "show", "config").out)
    partitions = _partitions(ask("scontrol", "--oneliner", "show", "partition").out)
    if not partitions:
        return _silent("it shows you no partition", "Ask the administrator for access.")
    number = settings.get("SLURM_VERSION", "?")
    findings = [
        passed("slurm", f"{number}, {ping.out.strip().splitlines()[0]}", version=number),
        _array_limits(settings, config),
        _history(settings),
        _requeue(settings),
        _preemption(settings),
        *_partitions_asked_for(partitions, config),
        *_accounts_and_qos(settings, config),
    ]
    return Slurm(findings, partitions)


def _silent(found: str, fix: str) -> Slurm:
    return Slurm([failed("slurm", found, fix)], {})


def partition_fields(partitions: _Partitions, wanted: str | None) -> Mapping[str, str]:
    """The fields of the (first) partition asked for, or of the default one; empty for neither."""
    if wanted:
        return partitions.get(wanted.split(",")[0], {})
    return next((p for p in partitions.values() if p.get("Default") == "YES"), {})


def _every_resources(config: RunConfig) -> list[Resources]:
    return [resources_of(config, kind) for kind in get_args(JobKind)]


def _settings(text: str) -> dict[str, str]:
    """`Key  = Value` lines."""
    pairs = (line.partition("=") for line in text.splitlines())
    return {key.strip(): value.strip() for key, separator, value in pairs if separator}


def _partitions(text: str) -> dict[str, dict[str, str]]:
    """One line a partition, `Key=Value` words."""
    found = {}
    for line in text.splitlines():
        fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
        if "PartitionName" in fields:
            found[fields["PartitionName"]] = fields
    return found


def _array_limits(settings: Mapping[str, str], config: RunConfig) -> Finding:
    # The highest index is one below MaxArraySize; 0 allows no array at all.
    size, jobs = int(settings.get("MaxArraySize", 0)), int(settings.get("MaxJobCount", 0))
    facts = {"max_array_size": size, "max_job_count": jobs}
    shown = f"MaxArraySize {size:,}, MaxJobCount {jobs:,}"
    if size < 2:
        return failed("array limits", f"{shown}: no job arrays",
                      "Ask the administrator to set MaxArraySize.", **facts)  # fmt: skip
    shards = max(
        *(s.num_shards for s in (config.generate, config.judge, config.evaluate)),
        config.dpo.reference_shards,
    )
    if shards > jobs:
        return warned("array limits", f"{shown}, but a stage has {shards:,} shards",
                      f"Set num_shards below {jobs:,}.", **facts)  # fmt: skip
    arrays = -(-shards // (size - 1))
    shown += f"; {shards:,} shards make {arrays} arrays" if arrays > 1 else ""
    return passed("array limits", shown, **facts)


def _history(settings: Mapping[str, str]) -> Finding:
    storage = settings.get("AccountingStorageType", "")
    answer = ask("sacct", "--noheader", "--allocations", "--starttime=now-1hours", timeout_s=20.0)
    if answer.ok:
        return passed("sacct", f"works ({storage})")
    age = settings.get("MinJobAge", "?")
    return warned(
        "sacct",
        f"{answer.complaint}; finished jobs are known for MinJobAge ({age}) from scontrol alone",
        "Nothing must be done: medtrain trusts files. GPU hours are then estimates.",
        storage=storage,
    )


def _requeue(settings: Mapping[str, str]) -> Finding:
    if settings.get("JobRequeue") == "1":
        return passed("requeue", "jobs are requeued after a node fails (JobRequeue 1)")
    return warned(
        "requeue",
        "JobRequeue 0: jobs that do not ask for it are not requeued",
        "Nothing must be done for medtrain's jobs, which ask with --requeue; where the site "
        "refuses, `medtrain resume RUN` submits what is missing.",
    )


def _preemption(settings: Mapping[str, str]) -> Finding:
    kind, mode = settings.get("PreemptType", "?"), settings.get("PreemptMode", "?")
    facts = {"type": kind, "mode": mode, "kill_wait": settings.get("KillWait", "?")}
    shown = f"{kind}, mode {mode}, KillWait {facts['kill_wait']}"
    if kind in ("preempt/none", "(null)", "?"):
        return passed("preemption", f"none; KillWait {facts['kill_wait']}", **facts)
    if "CANCEL" in mode.upper():
        return warned("preemption", f"{shown}: preempted jobs are cancelled, not requeued",
                      "`medtrain resume RUN` submits what is missing.", **facts)  # fmt: skip
    if "preempt_send_user_signal" not in settings.get("SlurmctldParameters", ""):
        shown += "; SIGTERM alone tells of it (no preempt_send_user_signal)"
    return passed("preemption", shown, **facts)


def _partitions_asked_for(partitions: _Partitions, config: RunConfig) -> list[Finding]:
    """One finding for each partition, with the longest time that a job asks for there."""
    default = partition_fields(partitions, None).get("PartitionName")
    longest: dict[str, int] = {}
    for resources in _every_resources(config):
        for name in (resources.partition or default or "").split(","):
            longest[name] = max(longest.get(name, 0), resources.time_min or 0)
    return [_partition(partitions, name, minutes) for name, minutes in longest.items()]


def _partition(partitions: _Partitions, name: str, time_min: int) -> Finding:
    fields = partitions.get(name)
    if fields is None:
        found = f"there is no partition {name}" if name else "no partition is the default"
        return failed("partition", found, f"Set cluster.partition: {', '.join(partitions)}")
    limit, usual = fields.get("MaxTime", "?"), fields.get("DefaultTime", "?")
    shown = (
        f"{name}: {fields.get('TotalNodes', '?')} nodes, time limit {limit}, default {usual}, "
        f"preemption {fields.get('PreemptMode', '?')}, grace {fields.get('GraceTime', '?')} s"
    )
    facts = {"partition": name, "max_time": limit, "nodes": fields.get("TotalNodes")}
    if fields.get("State") != "UP":
        return failed("partition", f"{shown}, state {fields.get('State')}",
                      "Choose another, or wait for the administrator.", **facts)  # fmt: skip
    minutes = _minutes(limit)
    if minutes is not None and time_min > minutes:
        return failed("partition", f"{shown}, but jobs ask for {time_min} minutes",
                      f"Set cluster.time_min to {minutes} or less.", **facts)  # fmt: skip
    return passed("partition", shown, **facts)


def _minutes(limit: str) -> int | None:
    """Minutes of Slurm's `days-hours:minutes:seconds`; None for UNLIMITED."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", limit)
    if found is None:
        return None
    days, hours, minutes, _ = (int(part or 0) for part in found.groups())
    return (days * 24 + hours) * 60 + minutes


def _accounts_and_qos(settings: Mapping[str, str], config: RunConfig) -> list[Finding]:
    found = []
    enforced = settings.get("AccountingStorageEnforce", "none").lower()
    for check, wanted in (("account", _wanted(config, "account")), ("qos", _wanted(config, "qos"))):
        if not wanted:
            found.append(skipped(check, f"cluster.{check} is not set: the default is used"))
            continue
        known = _associations(check)
        if not known:
            found.append(skipped(check, "no accounting database that could tell"))
        elif unknown := sorted(wanted - known):
            kind = failed if enforced not in ("none", "") else warned
            fix = f"cluster.{check}, one of: {', '.join(sorted(known))}"
            found.append(kind(check, f"you may not use {', '.join(unknown)}", fix))
        else:
            found.append(passed(check, ", ".join(sorted(wanted))))
    return found


def _wanted(config: RunConfig, field: str) -> set[str]:
    values = (getattr(resources, field) for resources in _every_resources(config))
    return {value for value in values if value}


def _associations(field: str) -> set[str]:
    """The accounts or qualities of service that this user may use; empty where nobody knows."""
    answer = ask("sacctmgr", "--noheader", "--parsable2", "show", "associations",
                 f"user={getpass.getuser()}", f"format={field}")  # fmt: skip
    return {value for value in re.split(r"[\s,]+", answer.out) if value} if answer.ok else set()
