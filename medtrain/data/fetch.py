"""`medtrain prepare --fetch`: fill the hub cache where there is a network, for jobs that have none.

what the run takes from the hub (medtrain.data.needs) → models: the files that loading needs, and no
others (safetensors, configuration, tokenizer) → datasets: as `prepare` itself loads them → a table
of what is there → a second process looks it all up with the hub switched off, as jobs will
(medtrain.data.cached). What was fetched before is not fetched again, a broken download goes on. No
code from the hub is run. The token is HF_TOKEN's, from the environment.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from medtrain.config import RunConfig
from medtrain.console import Console
from medtrain.data.cached import OFFLINE, weight_names
from medtrain.data.needs import HubData, HubModel, datasets_needed, models_needed
from medtrain.errors import DataError, EndpointError, MedtrainError, TryAgainError

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TOKENIZER_SUFFIXES = (".json", ".model", ".txt", ".jinja", ".tiktoken")
_TEMPLATES = "additional_chat_templates/"
_MEGABYTE = 1_000_000
_LOOK_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Fetched:
    """One thing that is in the cache now."""

    name: str
    why: str
    commit: str | None
    files: int
    bytes: int
    new_bytes: int
    """Of those: what was not there before."""
    path: str = ""


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
    for need in (*models, *datasets):
        try:
            one = _model(need, console) if isinstance(need, HubModel) else _dataset(need, console)
        except (DataError, _RefusedError) as error:
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
    console.event("fetch_done", f"The cache holds all that the run needs: {size(total)}",
                  mark="done", bytes=total, new_bytes=sum(one.new_bytes for one in fetched))  # fmt: skip
    return fetched


def size(count: float) -> str:
    """Bytes for a person."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count:.0f} B"


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


# Models


def _model(need: HubModel, console: Console) -> Fetched:
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache

    with _said_clearly(need.name, need.why):
        info = HfApi().model_info(need.name, revision=need.revision, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        wanted = _wanted(need, set(sizes))
        held = {
            name
            for name in wanted
            if isinstance(try_to_load_from_cache(need.name, name, revision=info.sha), str)
        }
        new_bytes = sum(sizes[name] for name in wanted - held)
        _check_space(need.name, new_bytes)
        console.event(
            "fetch",
            f"{need.name}: {len(wanted)} files, {size(sum(map(sizes.__getitem__, wanted)))}, "
            f"{size(new_bytes)} of them new",
            mark="start", model=need.name, files=len(wanted), new_bytes=new_bytes,
        )  # fmt: skip
        with _watching(need.name, new_bytes, console):
            path = snapshot_download(
                need.name, revision=need.revision, allow_patterns=[glob.escape(n) for n in wanted]
            )
    total = sum(sizes[name] for name in wanted)
    return Fetched(need.name, need.why, info.sha, len(wanted), total, new_bytes, str(path))


def _wanted(need: HubModel, names: set[str]) -> set[str]:
    """Of a repository's files, those that loading asks for.

    A list, not a pattern: repositories hold the same weights in other forms too
    (`consolidated.safetensors`, `original/`, PyTorch, GGUF).
    """
    small = {
        name
        for name in names
        if name.endswith(_TOKENIZER_SUFFIXES)
        and ("/" not in name or name.startswith(_TEMPLATES))
        and not name.endswith(".index.json")
    }
    if need.code:
        small |= {name for name in names if name.endswith(".py")}
    if not need.weights:
        return small
    if _SINGLE in names:
        return small | {_SINGLE}
    if _INDEX not in names:
        raise DataError(
            f"{need.name} ({need.why}) has no safetensors weights, and medtrain loads no others",
            fix="Use a repository that has them; most have a revision or a fork with safetensors.",
        )
    from huggingface_hub import hf_hub_download

    index = Path(hf_hub_download(need.name, _INDEX, revision=need.revision))
    return small | {_INDEX} | set(weight_names(index)) & names


def _check_space(name: str, wanted: int) -> None:
    from huggingface_hub.constants import HF_HUB_CACHE

    place = next(
        path for path in (Path(HF_HUB_CACHE), *Path(HF_HUB_CACHE).parents) if path.exists()
    )
    free = shutil.disk_usage(place).free
    if wanted > free:
        raise TryAgainError(
            f"{name} needs {size(wanted)} more, and {HF_HUB_CACHE} has {size(free)} free",
            fix="Free some space, or set cluster.hf_home to a larger disk that jobs see too.",
        )


@contextmanager
def _watching(name: str, new_bytes: int, console: Console) -> Iterator[None]:
    """A bar while a repository is downloaded, by what arrives on the disk.

    What the hub's own bars are told differs between its versions and ways of transfer.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    blobs = Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "blobs"
    before = _bytes_in(blobs, finished_only=True)
    ended = threading.Event()
    with console.progress(name, max(1, new_bytes // _MEGABYTE), unit="MB") as bar:

        def look() -> None:
            while not ended.wait(_LOOK_EVERY_S):
                bar.update(min(bar.total, (_bytes_in(blobs) - before) // _MEGABYTE))

        watcher = threading.Thread(target=look, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()


def _bytes_in(blobs: Path, *, finished_only: bool = False) -> int:
    total = 0
    for entry in os.scandir(blobs) if blobs.is_dir() else ():
        if not (finished_only and entry.name.endswith(".incomplete")):
            try:
                total += entry.stat().st_size
            except FileNotFoundError:
                continue  # renamed under our eyes
    return total


# Datasets


def _dataset(need: HubData, console: Console) -> Fetched:
    from medtrain.data.hub import load_hub_dataset

    console.event("fetch", f"{need.name}: dataset", mark="start", dataset=need.name)
    try:
        found = load_hub_dataset(need.name, need.source)
    except DataError as error:
        if _was_gated(error):
            raise _gated(need.name, need.why) from error
        raise
    files = [Path(entry["filename"]) for entry in found.dataset.cache_files]
    # Without a hub, `datasets` takes the newest of several revisions, whichever was asked for.
    for directory in {file.parent for file in files}:
        os.utime(directory)
    total = sum(file.stat().st_size for file in files)
    place = str(files[0].parent) if files else ""
    return Fetched(need.name, need.why, found.commit, len(files), total, 0, place)


# What can go wrong


class _RefusedError(EndpointError):
    """The hub answers, and does not give this one thing."""


@contextmanager
def _said_clearly(name: str, why: str) -> Iterator[None]:
    """Turn the hub's errors into one message each; none of them holds the token."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError

    transport = HfHubHTTPError.__bases__[0]  # of whichever HTTP library the hub's client uses
    try:
        yield
    except MedtrainError:
        raise
    except GatedRepoError as error:
        raise _gated(name, why) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status >= 500 or status == 429:
            raise _unreachable(name, why, f"status {status}") from error
        raise _RefusedError(
            f"The hub does not give {name} ({why}): status {status}",
            fix=f"Check the name and the revision; for a private repository export HF_TOKEN"
            f"{' of an account that sees it' if os.environ.get('HF_TOKEN') else ''}.",
        ) from error
    except HFValidationError as error:
        raise DataError(f"{why}: {name} is no hub id", fix="Write it like org/name.") from error
    except (transport, OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno is not None and error.filename:
            raise  # the disk's, not the hub's
        raise _unreachable(name, why, _first_line(error)) from error


def _unreachable(name: str, why: str, reason: str) -> EndpointError:
    token = os.environ.get("HF_TOKEN")
    return EndpointError(
        f"The hub cannot be reached for {name} ({why}): "
        f"{reason.replace(token, '…') if token else reason}",
        fix="Run it where there is a network (a login node; check HTTPS_PROXY and HF_ENDPOINT). "
        "What has arrived is kept.",
    )


def _gated(name: str, why: str) -> _RefusedError:
    terms = f"accept its terms on the hub (https://huggingface.co/{name})"
    fix = f"First {terms}, then export HF_TOKEN=… of that account."
    if os.environ.get("HF_TOKEN"):
        fix = f"HF_TOKEN is set, but its account has no access: {terms}."
    return _RefusedError(
        f"{name} ({why}) is gated: the hub gives it to known accounts only", fix=fix
    )


def _was_gated(error: BaseException) -> bool:
    from huggingface_hub.errors import GatedRepoError

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, GatedRepoError):
        cause = cause.__cause__
    return cause is not None


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


# Without a hub


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


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _last_line(text: str) -> str:
    return (text.strip() or "no output").splitlines()[-1]
