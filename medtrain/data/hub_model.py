"""One model of the hub, into the cache: the files that loading it asks for, and no others.

listing of the repository → safetensors (one file, or those that the index names), configuration,
tokenizer → less what the cache has → enough disk? → huggingface_hub downloads, goes on where a
download broke, and checks → what is there now
"""

from __future__ import annotations

import glob
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from medtrain.console import Console
from medtrain.data.cached import weight_names
from medtrain.data.hub_errors import said_clearly
from medtrain.data.needs import HubModel
from medtrain.errors import DataError, TryAgainError

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


def size(count: float) -> str:
    """Bytes for a person."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count:.0f} B"


def fetch_model(need: HubModel, console: Console) -> Fetched:
    """Bring a model into the cache.

    Raises:
        EndpointError: the hub cannot be reached, or refuses.
        DataError: it has no safetensors weights.
        TryAgainError: the disk is too small.
    """
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache

    with said_clearly(need.name, need.why):
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
