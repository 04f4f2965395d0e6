"""`medtrain prepare --fetch`: fill the hub cache where there is a network, for jobs that have none.

what the run takes from the hub (medtrain.data.needs) → models: the files that loading needs, and no
others (medtrain.data.hub_model) → datasets: as `prepare` itself loads them → a table of what is
there → a second process looks it all up with the hub switched off, as jobs will
(medtrain.data.cached). What was fetched before is not fetched again, a broken download goes on. No
code from the hub is run. The token is HF_TOKEN's, from the environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from medtrain.config import RunConfig
from medtrain.console import Console
from medtrain.data.cached import OFFLINE
from medtrain.data.hub_errors import RefusedError, gated, was_gated
from medtrain.data.hub_model import Fetched, fetch_model, size
from medtrain.data.needs import HubData, HubModel, datasets_needed, models_needed
from medtrain.errors import DataError, EndpointError, MedtrainError


def fetch(config: RunConfig, console: Console, environment: Mapping[str, str]) -> list[Fetched]:
    """Download what a run takes from the hub, and see that it is found without one.

    Call it before anything has imported huggingface_hub, which reads the environment once.

    Args:
        config: names models and datasets.
        console: told of progress; shows what the cache holds.
        environment: what jobs get; its HF_* variables say where the cache is.

    Raises:
        EndpointError: the hub cannot be reached, or refuses.
        DataError: there is no such model, dataset, revision or split, or a model has no
            safetensors weights.
        TryAgainError: the disk is too small.
    """
    models, datasets = models_needed(config), datasets_needed(config)
    if not models and not datasets:
        console.event("fetch", "Nothing of this run comes from the hub", mark="skip", models=0)
        return []
    _take_environment(environment)
    fetched: list[Fetched] = []
    refused: list[MedtrainError] = []
    needs: list[HubModel | HubData] = [*models, *datasets]
    for need in needs:
        try:
            one = (
                fetch_model(need, console)
                if isinstance(need, HubModel)
                else _dataset(need, console)
            )
        except (DataError, RefusedError) as error:
            refused.append(error)  # the others are fetched all the same
            continue
        fetched.append(one)
        console.log_only("fetched", item=one.name, commit=one.commit or "", bytes=one.bytes)
    if fetched:
        console.show(_table(fetched))
    _raise_together(refused)
    _check_offline(config, fetched, environment)
    _refuse_encoder_by_name(config, fetched)
    total = sum(one.bytes for one in fetched)
    console.event(
        "fetch_done",
        f"The cache holds all that the run needs: {size(total)}",
        mark="done",
        bytes=total,
        new_bytes=sum(one.new_bytes for one in fetched),
    )
    return fetched


def _take_environment(environment: Mapping[str, str]) -> None:
    """Use the cache of the jobs, and HF_TOKEN instead of whoever is logged in to the cache."""
    off = [
        name for name in OFFLINE if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
    ]
    if off:
        raise EndpointError(
            f"{off[0]} is set: nothing can be fetched", fix=f"Run it again after: unset {off[0]}"
        )
    for name, value in environment.items():
        if name.startswith(("HF_", "XDG_CACHE")) and name not in OFFLINE:
            os.environ[name] = value
    os.environ["HF_TOKEN_PATH"] = os.devnull


def _dataset(need: HubData, console: Console) -> Fetched:
    from medtrain.data.hub import load_hub_dataset

    console.event("fetch", f"{need.name}: dataset", mark="start", dataset=need.name)
    try:
        found = load_hub_dataset(need.name, need.source)
    except DataError as error:
        if was_gated(error):
            raise gated(need.name, need.why) from error
        raise
    files = [Path(entry["filename"]) for entry in found.dataset.cache_files]
    # Without a hub, `datasets` takes the newest of several revisions, whichever was asked for.
    for directory in {file.parent for file in files}:
        os.utime(directory)
    total = sum(file.stat().st_size for file in files)
    place = str(files[0].parent) if files else ""
    return Fetched(need.name, need.why, found.commit, len(files), total, 0, place)


def _raise_together(refused: list[MedtrainError]) -> None:
    if len(refused) == 1:
        raise refused[0]
    if refused:
        kind = EndpointError if any(isinstance(e, EndpointError) for e in refused) else DataError
        raise kind(
            f"{len(refused)} things cannot be had:\n"
            + "\n".join(f"  {error.message}" for error in refused),
            fix="\n".join(dict.fromkeys(error.fix for error in refused)),
        )


def _refuse_encoder_by_name(config: RunConfig, fetched: list[Fetched]) -> None:
    """BERTScore's encoder is loaded from a directory: say which one it is now."""
    for one in fetched:
        if one.name == config.evaluate.bertscore_model:
            raise DataError(
                f"evaluate.bertscore_model must be a directory, not the hub id {one.name}",
                fix=f"It is there now: set evaluate.bertscore_model={one.path}",
            )


def _check_offline(
    config: RunConfig, fetched: list[Fetched], environment: Mapping[str, str]
) -> None:
    """See in a process of its own that loaders find everything; it reads the switches anew."""
    done = subprocess.run(
        [sys.executable, "-m", "medtrain.data.cached"],
        input=config.model_dump_json(),
        capture_output=True,
        text=True,
        env={**os.environ, **_hub_part(environment), **dict.fromkeys(OFFLINE, "1")},
        check=False,
    )
    if done.returncode:
        raise MedtrainError(
            "What was fetched cannot be looked up again: " + _last_line(done.stderr),
            fix="Run it again; the downloads are kept.",
        )
    found: list[dict[str, Any]] = json.loads(_last_line(done.stdout))
    commits = {(one.name, one.why): one.commit for one in fetched}
    problems = [f"  {one['name']}: {one['problem']}" for one in found if one["problem"]]
    problems += [
        f"  {one['name']}: without the hub, commit {one['commit']} is found instead"
        for one in found
        if not one["problem"] and one["commit"] != commits[one["name"], one["why"]]
    ]
    if problems:
        raise DataError(
            "Not everything is found without the hub:\n" + "\n".join(problems),
            fix="Remove these from the cache and fetch again. `datasets` finds one revision of a "
            "dataset without the hub: where two are wanted, give local files. Name `subset` where "
            "a dataset has several.",
        )


def _hub_part(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: v for name, v in environment.items() if name.startswith(("HF_", "XDG_CACHE"))}


def _table(fetched: list[Fetched]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("in the cache", "needed as", "commit", "files", "size", "new"):
        right = column in ("files", "size", "new")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    for one in fetched:
        new = size(one.new_bytes) if one.new_bytes else ""
        commit = (one.commit or "")[:12]
        table.add_row(one.name, one.why, commit, str(one.files), size(one.bytes), new)
    return table


def _last_line(text: str) -> str:
    return (text.strip() or "no output").splitlines()[-1]
