"""One training stage on this node's devices, from the decision to the error that is meant."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import IO, Any, cast, get_args

from medtrain.beforehand import check_packages
from medtrain.config import RunConfig
from medtrain.config.training import Strategy
from medtrain.console import Console
from medtrain.environment import STRATEGY_VARIABLE, is_launched
from medtrain.errors import (
    DEBUG_VARIABLE,
    BadNodeError,
    DataError,
    MedtrainError,
    StoppedError,
    from_record,
)
from medtrain.files import read_json
from medtrain.launch import devices
from medtrain.launch.command import Node, command, environment
from medtrain.launch.ended import error_of, killed_by
from medtrain.launch.meeting import Meeting, agreed
from medtrain.launch.place import NodePlace
from medtrain.launch.processes import Processes
from medtrain.launch.strategy import Chosen, asked_for, choose, refuse
from medtrain.launch.worker import IN_JOB_VARIABLE, begin
from medtrain.lineage import Lineage
from medtrain.run import Run, Trained

_PROCESSES_A_CORE = 4
"""More would only wait for each other; so many, a person may try on purpose."""


def check_launch(config: RunConfig) -> None:
    """Refuse settings that cannot be launched on this machine, before anything has been done.

    Raises:
        ConfigError: the strategy is known not to work here.
        BadNodeError: there are to be more processes than the machine has devices for.
    """
    if is_launched():
        return
    gpus = devices.gpu_count()
    _processes(config, gpus)
    chosen = asked_for(config)
    if chosen is not None:
        refuse(chosen.strategy, config, on_gpu=gpus > 0)


def launch(run: Run, config: RunConfig, stage: str, console: Console) -> bool:
    """Train in processes of their own, to their end; False where this process is to train.

    Raises:
        ConfigError: what is asked for is known not to work here.
        BadNodeError: this node lacks what it needs, or the nodes do not find each other.
        MedtrainError: the processes' own error, or one that names their exit code.
    """
    if is_launched():
        begin()
        refuse(os.environ.get(STRATEGY_VARIABLE, "ddp"), config, on_gpu=devices.gpu_count() > 0)
        return False
    place = NodePlace.from_environment()
    if place.nodes == 1 or (place.rank == 0 and IN_JOB_VARIABLE not in os.environ):
        # An error of an earlier try must not pass for this one's; a job sees to that itself.
        Lineage(run).forget_failure(stage)
    try:
        check_packages(config)
        return _launch(run, config, cast("Trained", stage), console, place)
    except MedtrainError as error:
        if place.nodes > 1 or IN_JOB_VARIABLE in os.environ:
            # srun's exit code is that of a task that was killed because this one failed.
            Lineage(run).record_failure(stage, error)
        raise


def _launch(
    run: Run, config: RunConfig, stage: Trained, console: Console, place: NodePlace
) -> bool:
    gpus = devices.gpu_count()
    node = Node(place, _processes(config, gpus), gpus)
    chosen: Chosen | None = None

    def decide() -> Chosen:
        nonlocal chosen
        chosen = _begun(run, config, stage) or choose(config, stage, gpus=node.total if gpus else 0)
        if chosen.strategy == "fsdp2":
            _refuse_new_tokens(run)
        return chosen

    with agreed(run, stage, place, lambda: decide().strategy) as meeting:
        if chosen is not None and (node.gpus or node.total > 1):
            _say(chosen, stage, node, console)
        if node.gpus == 0 and node.total == 1 and meeting.strategy == "ddp":
            return False
        _run(run, config, stage, console, node, meeting)
    return True


def _refuse_new_tokens(run: Run) -> None:
    from medtrain.data.tokenizer import load_chat_tokenizer
    from medtrain.train.fsdp import refuse_new_tokens

    refuse_new_tokens(load_chat_tokenizer(run).new_token_ids)


def _begun(run: Run, config: RunConfig, stage: Trained) -> Chosen | None:
    """The strategy of a training that has begun, where `auto` might now find another one.

    A job that is queued again may get other GPUs, which could not read its checkpoints.
    """
    if config.train.strategy != "auto" or config.train.accelerate_config is not None:
        return None
    written = sorted(
        (int(path.parent.name.rpartition("-")[2]), path)
        for path in run.checkpoints(stage).glob("checkpoint-*/complete.json")
    )
    if not written:
        return None
    try:
        strategy = read_json(written[-1][1])["plan"]["strategy"]
    except (DataError, KeyError, TypeError):
        return None  # a damaged one is refused by whoever goes on from it
    return Chosen(strategy, "as it was begun") if strategy in get_args(Strategy) else None


def _say(chosen: Chosen, stage: str, node: Node, console: Console) -> None:
    message = f"{stage}: {chosen.strategy} on {node.total} processes ({chosen.reason})"
    fields: dict[str, Any] = {
        "stage": stage,
        "strategy": chosen.strategy,
        "processes": node.total,
    }
    if chosen.fits:
        console.event("strategy", message, **fields)
    else:
        console.warn("strategy", message, **fields)


def _processes(config: RunConfig, gpus: int) -> int:
    """On this node."""
    wanted = config.train.processes
    processes = (gpus or 1) if wanted == "auto" else wanted
    if gpus and processes > gpus:
        raise BadNodeError(
            f"train.processes is {processes}, but this machine shows {gpus} GPUs",
            fix="Set train.processes=auto, or look at CUDA_VISIBLE_DEVICES.",
        )
    if not gpus and processes > _PROCESSES_A_CORE * devices.cpu_cores():
        raise BadNodeError(
            f"train.processes is {processes}, but this machine has {devices.cpu_cores()} CPU cores",
            fix="Set train.processes=auto, or to the number of cores at most.",
        )
    return processes


def _run(
    run: Run, config: RunConfig, stage: Trained, console: Console, node: Node, meeting: Meeting
) -> None:
    program = ["-m", "medtrain", stage, str(run.config)]
    started = command(config, program, node, meeting)
    surroundings = {**environment(node, meeting), **run.lock_environment()}
    console.event("launch", f"{stage}: {shlex.join(['python', *started[1:]])}", stage=stage)
    rank = node.place.rank
    log = run.logs / (f"{stage}.launch.{rank}.log" if rank else f"{stage}.launch.log")
    with log.open("wb") as said:
        stderr: IO[bytes] | None = None if DEBUG_VARIABLE in os.environ else said
        processes = Processes(started, surroundings, stderr)
        code = processes.run()
    if code:
        raise _error(run, stage, code, log, processes.were_asked_to_stop)


def _error(run: Run, stage: str, code: int, log: Path, stopped: bool) -> MedtrainError:
    failure = Lineage(run).failure(stage)
    if failure is not None:
        return from_record(failure)
    again = f"`medtrain run {run.config}` goes on from the last checkpoint."
    killed = killed_by(code, log)
    if stopped and killed is None:
        return StoppedError(f"{stage} was stopped before it could save", fix=again)
    return error_of(stage, code, killed, log, again)
