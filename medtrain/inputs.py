"""What a run reads that no stage of it made: data files, base model, judge, template.

A local path counts by what lies there, not by where it is: digests here, and `portable` for the
settings, so that moving data or a model to another directory reruns nothing.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from medtrain.config import RunConfig, VariantConfig
from medtrain.console import is_rank_zero
from medtrain.digests import files_digest, quick_digest
from medtrain.files import digest_of, read_json, sha256_file, write_json
from medtrain.run import Run


def prepare_inputs(run: Run, config: RunConfig) -> dict[str, str]:
    """What `prepare` reads: data files, a template file, a local base's tokenizer."""
    return {**data_files(run, config), **_template_file(config), **base_files(run, config)}


def data_files(run: Run, config: RunConfig) -> dict[str, str]:
    """Digests of the local files that the sources name.

    Raises:
        DataError: a file that is named is not there.
    """
    from medtrain.data.reading import files_of, resolve

    for source in config.data.sources:
        resolve(source)
    known = read_json(run.source_hashes) if run.source_hashes.exists() else {}
    of_source = [files_of(source) for source in config.data.sources]
    described = files_digest(sorted({file for files in of_source for file in files}), known)
    if described != known and run.root.is_dir() and is_rank_zero():
        # It saves reading them again; whoever may only look at the run does without.
        with suppress(OSError):
            write_json(run.source_hashes, described)
    # By name and source, since the directory may change: files of one name count together.
    contents: dict[str, list[tuple[int, str]]] = {}
    for place, files in enumerate(of_source):
        for file in files:
            contents.setdefault(file.name, []).append((place, described[str(file)]["sha256"]))
    return {f"file {name}": digest_of(found) for name, found in sorted(contents.items())}


def base_files(run: Run, config: RunConfig) -> dict[str, str]:
    """Digest of a local base model; a hub id counts by its revision, among the settings."""
    directory = Path(config.model.base).expanduser()
    return {"base model": quick_digest(directory)} if directory.is_dir() else {}


def _template_file(config: RunConfig) -> dict[str, str]:
    path = Path(config.model.chat_template).expanduser()
    return {"chat template": sha256_file(path)} if path.is_file() else {}


def evaluated_models(run: Run, config: RunConfig) -> dict[str, str]:
    """Digests of the local models that `evaluate` loads besides the run's own."""
    found = base_files(run, config) if "base" in config.evaluate.variants else {}
    for variant in config.evaluate.variants:
        if isinstance(variant, VariantConfig) and Path(variant.path).expanduser().is_dir():
            found[f"variant {variant.name}"] = quick_digest(Path(variant.path).expanduser())
    encoder = config.evaluate.bertscore_model
    if encoder and Path(encoder).expanduser().is_dir():
        found["bertscore model"] = quick_digest(Path(encoder).expanduser())
    return {**found, **judge_files(run, config)}


def judge_files(run: Run, config: RunConfig) -> dict[str, str]:
    """Digest of a local judge model."""
    directory = Path(config.judge.model).expanduser()
    local = config.judge.kind == "model" and directory.is_dir()
    return {"judge model": quick_digest(directory)} if local else {}


def anchored(config: RunConfig) -> RunConfig:
    """The configuration with local paths made absolute: it means the same from any directory."""
    tree = config.model_dump(mode="json")
    sections = [(tree["model"], "base"), (tree["model"], "chat_template"), (tree["judge"], "model")]
    sections += [(tree["evaluate"], "bertscore_model"), (tree["train"], "accelerate_config")]
    sections += [(v, "path") for v in tree["evaluate"]["variants"] if isinstance(v, dict)]
    for section, key in sections:
        section[key] = _absolute(section[key]) if section[key] else section[key]
    for source in tree["data"]["sources"]:
        path = source["path"]
        source["path"] = _absolute(path) if isinstance(path, str) else [_absolute(p) for p in path]
    return RunConfig.model_validate(tree)


def _absolute(path: str) -> str:
    place = Path(path).expanduser()
    return str(place.absolute()) if place.exists() or glob.has_magic(path) else path


def portable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in which local paths are names: what lies there counts by its content.

    Moving data or a base model to another directory then changes nothing.
    """
    moved = dict(settings)
    for key in ("model.base", "model.chat_template", "judge.model", "evaluate.bertscore_model"):
        if moved.get(key):
            moved[key] = _portable_path(moved[key])
    if "evaluate.variants" in moved:
        moved["evaluate.variants"] = [
            v if isinstance(v, str) else {**v, "path": _portable_path(v["path"])}
            for v in moved["evaluate.variants"]
        ]
    if "data.sources" in moved:
        moved["data.sources"] = [_portable_source(source) for source in moved["data.sources"]]
    return moved


def _portable_source(source: Mapping[str, Any]) -> dict[str, Any]:
    path = source["path"]
    paths = [path] if isinstance(path, str) else path
    return {**source, "path": [_portable_path(one) for one in paths]}


def _portable_path(path: str) -> str:
    local = Path(path).is_absolute() or Path(path).expanduser().exists()
    return Path(path).name if local else path
