"""Whether a training goes on from the checkpoints of another one, begins anew, or must not begin.

the same steps of the same rows → goes on, where these processes can read what those wrote;
other steps or rows because settings changed → another training, which begins anew; because there
are other processes → refused, since a smaller share of a cluster should not cost a training.
"""

from __future__ import annotations

from medtrain.console import Console
from medtrain.errors import ConfigError
from medtrain.run import Run, Trained
from medtrain.train.checkpoints import Plan


def continues(run: Run, stage: Trained, then: Plan, now: Plan, console: Console) -> bool:
    """Whether training goes on from checkpoints of the plan `then`; False: it is another one.

    Raises:
        ConfigError: these processes cannot go on from what those wrote.
    """
    anew = f"begin anew: medtrain run {run.config} --force {stage}"
    if now.strategy == "fsdp2":
        raise ConfigError(
            f"{stage} has checkpoints, and going on from them under fsdp2 is not possible",
            fix=f"Use train.strategy=zero3, or {anew}",
        )
    if then == now:
        return True
    if _steps(then) == _steps(now):
        if {then.strategy, now.strategy} == {"ddp"}:
            console.event(
                "processes_changed",
                f"{stage}: going on with {_processes(now)} in place of {then.processes}: the same "
                "rows in every step, other draws of dropout",
            )
            return True
        raise ConfigError(
            f"{stage} was begun by {_processes(then)} under {then.strategy}, and {_processes(now)} "
            f"under {now.strategy} cannot read their optimiser state",
            fix=f"Go on with train.strategy={then.strategy} and {_processes(then)}, or {anew}",
        )
    if then.processes != now.processes:
        raise ConfigError(
            f"{stage} was begun with {then.rows_a_step} rows a step by {_processes(then)}; "
            f"{_processes(now)} would make {now.rows_a_step}, which is another training",
            fix=f"Take {_processes(then)} again, or set {stage}.batch_size and "
            f"{stage}.gradient_accumulation so that their product with the processes is "
            f"{then.rows_a_step}, or {anew}",
        )
    return False


def difference(then: Plan, now: Plan) -> str:
    """What makes two plans two trainings: `8 rows a step (now 4), 50 steps (now 100)`."""
    names = ("rows a step", "steps", "steps an epoch")
    both = zip(names, _steps(then), _steps(now), strict=True)
    return ", ".join(
        f"{before} {name} (now {after})" for name, before, after in both if before != after
    )


def _steps(plan: Plan) -> tuple[int, int, int]:
    return plan.rows_a_step, plan.max_steps, plan.steps_per_epoch


def _processes(plan: Plan) -> str:
    return "1 process" if plan.processes == 1 else f"{plan.processes} processes"
