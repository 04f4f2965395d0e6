"""What a kind of job asks Slurm for, and the shell lines before its command.

defaults of the kind → `cluster:` → `cluster.stages.<kind>` → sbatch options (long names → values).
"""

from __future__ import annotations

import shlex
import sys
from typing import Any

from medtrain.config import JobKind, Resources, RunConfig

Options = dict[str, str | int | bool]


def resources_of(config: RunConfig, kind: JobKind) -> Resources:
    """What a kind of job asks for."""
    merged: dict[str, Any] = _defaults(config, kind)
    for layer in (config.cluster, config.cluster.stages.get(kind)):
        if layer is not None:
            given = layer.model_dump(include=set(Resources.model_fields), exclude_none=True)
            merged |= {**given, "sbatch": {**merged["sbatch"], **given["sbatch"]}}
    if not _uses_gpus(config, kind) and "gpus" not in _given(config, kind):
        merged["gpus"], merged["gpu_type"] = 0, None
    if kind not in ("sft", "dpo"):
        merged["nodes"] = 1
    if kind == "reference" and "gpus" not in _given(config, kind):
        merged["gpus"] = min(merged["gpus"], 1)
    return Resources(**merged)


def _defaults(config: RunConfig, kind: JobKind) -> dict[str, Any]:
    defaults: dict[str, Any] = {"gpus": 1, "cpus": 8, "time_min": 240, "nodes": 1, "sbatch": {}}
    return defaults if _uses_gpus(config, kind) else {**defaults, "gpus": 0, "cpus": 4}


def _given(config: RunConfig, kind: JobKind) -> dict[str, Any]:
    layer = config.cluster.stages.get(kind)
    return layer.model_dump(exclude_none=True) if layer else {}


def _uses_gpus(config: RunConfig, kind: JobKind) -> bool:
    """Whether a kind of job can use a GPU at all."""
    if config.model.base.startswith("builtin:"):
        return False
    local = {
        "cpu": False,
        "judge": config.judge.kind == "model",
        "generate": config.generate.engine != "openai",
        "evaluate": config.evaluate.engine != "openai",
    }
    return local.get(kind, True)


def sbatch_options(config: RunConfig, kind: JobKind) -> Options:
    """The options that say where a job runs and what it gets; no job name, log or dependency."""
    wanted = resources_of(config, kind)
    options: Options = {
        name: value
        for name in ("account", "partition", "qos", "constraint", "reservation", "exclude")
        if (value := getattr(wanted, name)) is not None
    }
    options["nodes"] = wanted.nodes or 1
    options["ntasks-per-node"] = 1
    if wanted.gpus:
        count = str(wanted.gpus)
        options["gpus-per-node"] = f"{wanted.gpu_type}:{count}" if wanted.gpu_type else count
    if wanted.cpus:
        options["cpus-per-task"] = wanted.cpus
    if wanted.mem_gb:
        options["mem"] = f"{int(wanted.mem_gb * 1024)}M"
    if wanted.time_min:
        options["time"] = wanted.time_min
    options["requeue"] = True
    return {**options, **wanted.sbatch}


def total_gpus(config: RunConfig, kind: JobKind) -> int:
    """GPUs of one job of a kind, over all its nodes."""
    wanted = resources_of(config, kind)
    return (wanted.gpus or 0) * (wanted.nodes or 1)


def setup_lines(config: RunConfig) -> list[str]:
    """Shell lines before a job's command: modules, activation, environment."""
    cluster = config.cluster
    lines = ["set -e"]
    lines += [f"module load {shlex.quote(module)}" for module in cluster.modules]
    lines += [cluster.activate] if cluster.activate else []
    lines += cluster.setup
    lines += [f"export {k}={shlex.quote(v)}" for k, v in job_environment(config).items()]
    # srun hands on what the job has, also where the site keeps the submitter's environment from it.
    lines.append("export SLURM_EXPORT_ENV=ALL")
    # What a shell inside a job inherits about processor binding is the submitter's, not its own.
    lines.append("unset SLURM_CPU_BIND SLURM_CPU_BIND_LIST SLURM_CPU_BIND_TYPE")
    return lines


def job_environment(config: RunConfig) -> dict[str, str]:
    """Environment variables that every job gets; none of them is a secret."""
    cluster = config.cluster
    environment: dict[str, str] = {"PYTHONUNBUFFERED": "1"}
    if cluster.offline:
        environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    if cluster.hf_home:
        environment["HF_HOME"] = cluster.hf_home
    return {**environment, **cluster.environment}


def job_python(config: RunConfig) -> str:
    """How a job starts Python, as a shell words."""
    python = shlex.quote(config.cluster.python or sys.executable)
    return f"{config.cluster.container} {python}" if config.cluster.container else python


def batch_python(config: RunConfig) -> str:
    """The python of a training job's batch step, which calls srun: outside of any container."""
    cluster = config.cluster
    contained = cluster.container or any(a.startswith("--container-") for a in cluster.srun)
    return sys.executable if contained or cluster.python is None else cluster.python
