"""The commands that a plan ends with: what is fetched, exported and submitted first."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from medtrain.config import RunConfig
from medtrain.data.needs import datasets_needed, models_needed
from medtrain.endpoint import read_secrets
from medtrain.selection import Selection

if TYPE_CHECKING:
    from medtrain.cluster.plan import PlannedJob


def commands_of(
    config: RunConfig,
    config_name: str,
    jobs: Sequence[PlannedJob],
    before: Sequence[str],
    selection: Selection,
) -> Iterator[str]:
    """What a person types, in order; nothing where everything is done.

    Args:
        config: the run's.
        config_name: as it was given.
        jobs: of the plan.
        before: stages that must run before the chosen ones, and are not done.
        selection: the chosen ones.
    """
    if all(job.state == "done" for job in jobs):
        return
    if config.cluster.offline and (models_needed(config) or datasets_needed(config)):
        yield f"medtrain prepare {config_name} --fetch"
    judge = config.judge
    asks = any(job.kind == "judge" and job.state == "to do" for job in jobs)
    if asks and judge.kind == "openai" and not judge.base_url:
        named = {*os.environ, *read_secrets(config.cluster.secrets_file)}
        if judge.api_key_env not in named:
            yield f"export {judge.api_key_env}=…"
    if before:
        yield f"medtrain submit {config_name} --until {before[-1]}"
    chosen = {"--from": selection.start, "--until": selection.until, "--only": selection.only}
    options = "".join(f" {option} {name}" for option, name in chosen.items() if name)
    yield f"medtrain submit {config_name}{options}"
