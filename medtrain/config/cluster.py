"""`cluster:` what Slurm is asked for, and what a job's environment is made of.

A site's own values stand once, in a file of the same keys (`slurm/site.yaml`, see
slurm/site.example.yaml); a run's `cluster:` section is laid over it, and `stages:` over both.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from medtrain.config.base import Section

JobKind = Literal["cpu", "sft", "merge", "generate", "judge", "reference", "dpo", "evaluate"]
"""Kinds of jobs that may ask for different resources. `cpu`: prepare, pairs, report, and the short
jobs that open and collect the arrays. `judge` also judges the evaluation's answers. `reference`:
one GPU is all it can use."""

# A secret in the configuration would end in scripts, logs and reports.
_SECRET = r"(?:API)?(?:KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL)S?"
_SECRET_NAME = re.compile(rf"(?:^|_){_SECRET}(?:_|$)", re.IGNORECASE)
_SECRET_GIVEN = re.compile(rf"\b(\w*_)?{_SECRET}=[^$\s]", re.IGNORECASE)


class Resources(Section):
    """What one job asks Slurm for; what is null is not asked for, and the site's default holds."""

    account: str | None = None
    """Whom the time is charged to."""
    partition: str | None = None
    """Partition, or several with commas."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Node features, such as `a100`."""
    reservation: str | None = None
    """A reservation to run in."""
    exclude: str | None = None
    """Nodes to keep off, such as `node[07,12]`."""
    nodes: int | None = Field(None, ge=1)
    """Nodes of one job; training only."""
    gpus: int | None = Field(None, ge=0)
    """GPUs a node."""
    gpu_type: str | None = None
    """Type in `--gpus-per-node=TYPE:N`, such as `a100`."""
    cpus: int | None = Field(None, ge=1)
    """CPU cores a task (a node, in training)."""
    mem_gb: float | None = Field(None, gt=0)
    """Memory a node, in GiB."""
    time_min: int | None = Field(None, ge=1)
    """Time limit of one job, in minutes. A shard or training that needs longer is requeued and goes
    on."""
    sbatch: dict[str, str | int | bool] = Field(default_factory=dict)
    """Further options of sbatch by their long names, such as `mail-type: FAIL`; true for an option
    without a value."""


class ClusterConfig(Resources):
    """Slurm: resources, environment, and how arrays are run."""

    site: str | None = None
    """A file with this section's keys, laid under it; null takes `slurm/site.yaml` of the working
    directory, or the file that MEDTRAIN_SITE names, where there is one."""
    stages: dict[JobKind, Resources] = Field(default_factory=dict)
    """Other resources for one kind of job."""
    parallelism: int = Field(32, ge=1)
    """Tasks of an array that run at a time."""
    repair_rounds: int = Field(3, ge=0)
    """How often missing shards are submitted again without one more row to show for it, before a
    person is asked."""
    look_again_s: int = Field(60, ge=0)
    """How long a collect job looks again for a file that seems to be absent before it has a shard
    computed again, in seconds: a network file system remembers absence that long."""
    repair_pause_s: int = Field(60, ge=0)
    """How long the first repair waits where shards failed for a reason outside, such as an endpoint
    that was down or a full disk, in seconds; each round in vain doubles it."""
    max_requeues: int = Field(20, ge=0)
    """How often a job that ran into its time limit is requeued."""
    signal_delay_s: int = Field(120, ge=10)
    """How long before the time limit a job is told to save and requeue, in seconds."""
    modules: list[str] = Field(default_factory=list)
    """`module load` these, in this order."""
    activate: str | None = None
    """Shell line that activates the environment, such as `source ~/envs/medtrain/bin/activate`."""
    setup: list[str] = Field(default_factory=list)
    """Further shell lines before a job's command; the job ends if one of them fails."""
    container: str | None = None
    """Put before the job's command, such as `apptainer exec --nv medtrain.sif`."""
    srun: list[str] = Field(default_factory=list)
    """Further arguments of srun, such as `--container-image=medtrain.sqsh` of pyxis."""
    python: str | None = None
    """The python of jobs; null takes the one that submits. Needed with a container."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Environment variables of jobs. No secrets: those come from the submitting shell's
    environment, or from `secrets_file`."""
    offline: bool = True
    """Compute nodes reach no hub: HF_HUB_OFFLINE=1 in jobs. `medtrain prepare --fetch` fills the
    cache on a login node."""
    hf_home: str | None = None
    """Hub cache that login and compute nodes share; null keeps HF_HOME."""
    secrets_file: str | None = None
    """A file of NAME=value lines that only its owner may read (0600); whoever computes reads it."""

    @field_validator("environment")
    @classmethod
    def _no_secrets(cls, environment: dict[str, str]) -> dict[str, str]:
        named = sorted(name for name in environment if _SECRET_NAME.search(name))
        if named:
            raise ValueError(
                f"{', '.join(named)} looks like a secret: export it in the shell that submits, or "
                "put it into cluster.secrets_file"
            )
        return environment

    @model_validator(mode="after")
    def _no_secrets_in_shell_lines(self) -> ClusterConfig:
        for line in (*self.setup, self.activate or "", self.container or "", *self.srun):
            if found := _SECRET_GIVEN.search(line):
                raise ValueError(
                    f"a shell line sets a secret ({found[0].partition('=')[0]}=…): it would stand "
                    "in every script; use cluster.secrets_file"
                )
        return self

    @model_validator(mode="after")
    def _sbatch_options_are_free(self) -> ClusterConfig:
        for options in (self.sbatch, *(stage.sbatch for stage in self.stages.values())):
            ours = sorted(set(options) & _OURS)
            if ours:
                raise ValueError(f"sbatch: {', '.join(ours)} is set by medtrain")
        return self

    @model_validator(mode="after")
    def _jobs_are_told_in_time(self) -> ClusterConfig:
        limits = [layer.time_min for layer in (self, *self.stages.values()) if layer.time_min]
        if limits and min(limits) * 60 < self.signal_delay_s + _SIGNAL_EARLY_S:
            raise ValueError(
                f"time_min: {min(limits)} leaves no time before the signal, which comes "
                f"signal_delay_s = {self.signal_delay_s} seconds before the limit, or up to "
                f"{_SIGNAL_EARLY_S} sooner"
            )
        return self


_SIGNAL_EARLY_S = 60
"""How much sooner than asked for Slurm may signal (sbatch's manual, --signal). A job that is told
before its step has begun never hears of it."""
_OURS = {"array", "clusters", "comment", "dependency", "error", "export", "job-name",
         "kill-on-invalid-dep", "open-mode", "output", "parsable", "quiet", "requeue", "signal",
         "test-only", "time", "wait", "wrap"}  # fmt: skip
