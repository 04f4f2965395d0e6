"""From a YAML file and overrides to a checked RunConfig, and back.

read file → merge onto its `extends:` parents → apply `dotted.key=value` → lay `cluster:` over the
site's file → collect *all* problems → one ConfigError, or a RunConfig.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from medtrain.config.problems import describe
from medtrain.config.trainer_fields import trainer_problems
from medtrain.config.tree import RunConfig, joint_problems
from medtrain.errors import ConfigError

SITE_VARIABLE = "MEDTRAIN_SITE"
"""Names the site's file, for people who run from many directories."""
DEFAULT_SITE = Path("slurm/site.yaml")


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number, as in YAML 1.2 and JSON, and a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        doubled = next((key for key in keys if keys.count(key) > 1), None)
        if doubled is not None:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {doubled!r} stands twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that `_Loader` would take for numbers."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"),
        list("-+0123456789"),
    )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The checked configuration of a file, or of a run directory that holds a config.yaml.

    Raises:
        ConfigError: the file is missing, not YAML, or any value in it is wrong; all problems at
            once.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "config.yaml"
    tree = _read_with_parents(path, seen=())
    tree.setdefault("name", path.stem if path.stem != "config" else path.parent.name)
    for override in overrides:
        _apply_override(tree, override)
    source = str(path)
    # A run's own configuration has it in it.
    if path.name != "config.yaml" or not (path.parent / "stages").is_dir():
        site = _lay_over_site(tree)
        source += f" and {site}" if site else ""
    return parse_config(tree, source=source)


def site_section() -> dict[str, Any]:
    """The site's own `cluster:` values; empty where it has no file.

    Raises:
        ConfigError: the file cannot be read.
    """
    tree: dict[str, Any] = {}
    _lay_over_site(tree)
    return dict(tree.get("cluster", {}))


def _lay_over_site(tree: dict[str, Any]) -> Path | None:
    """Put the site's values under the run's `cluster:` section; the site's file, if it has one."""
    cluster = tree.get("cluster") or {}
    if not isinstance(cluster, dict):
        return None  # the check of the whole tree says so
    named = cluster.get("site") or os.environ.get(SITE_VARIABLE)
    path = Path(str(named)).expanduser() if named else DEFAULT_SITE
    if not named and not path.is_file():
        return None
    tree["cluster"] = {**_merge(_read_yaml(path), cluster), "site": str(path.absolute())}
    return path


def parse_config(tree: Mapping[str, Any], source: str = "configuration") -> RunConfig:
    """Check a tree of plain values; ConfigError lists every problem in it."""
    problems = joint_problems(tree) + trainer_problems(tree)
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        problems = describe(error, RunConfig) + problems
    if problems:
        plural = "s" if len(problems) > 1 else ""
        listing = "\n".join(f"  {problem}" for problem in problems)
        raise ConfigError(
            f"{len(problems)} problem{plural} in {source}:\n{listing}",
            fix="`medtrain schema` prints every key with its type, default and meaning.",
        )
    return config


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML that loads to the same RunConfig.

    In ASCII: YAML takes some Unicode characters for line ends, and would lose them.
    """
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


def _read_with_parents(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    resolved = path.resolve()
    if resolved in seen:
        chain = " → ".join(str(p) for p in (*seen, resolved))
        raise ConfigError(f"`extends` goes in a circle: {chain}")
    tree = _read_yaml(path)
    parents = tree.pop("extends", [])
    if isinstance(parents, str):
        parents = [parents]
    if not isinstance(parents, list) or not all(isinstance(p, str) for p in parents):
        raise ConfigError(f"{path}: `extends` must be a path or a list of paths")
    merged: dict[str, Any] = {}
    for parent in parents:
        parent_path = path.parent / os.path.expanduser(parent)  # noqa: PTH111 - `~` may lead
        if not parent_path.exists():
            raise ConfigError(
                f"{path} extends {parent}, and there is no file {parent_path}",
                fix="`extends` starts at the directory of the file that names it.",
            )
        inherited = _read_with_parents(parent_path, (*seen, resolved))
        inherited.pop("name", None)
        merged = _merge(merged, inherited)
    return _merge(merged, tree)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ConfigError(
            f"There is no configuration file {path}",
            fix="Give a YAML file, such as configs/quickstart.yaml, or a run directory.",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of keys, not a {type(tree).__name__}")
    return tree


def _merge(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings merge key by key; anything else (lists too) is replaced."""
    merged = dict(below)
    for key, value in above.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _apply_override(tree: dict[str, Any], override: str) -> None:
    dotted, separator, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not separator or not all(keys):
        raise ConfigError(
            f"The override {override!r} is not of the form dotted.key=value",
            fix="For example: sft.epochs=2 data.sources.0.path=rows.jsonl",
        )
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"The value of the override {override!r} is not YAML: {error}") from error
    node: Any = tree
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(node, list):
            node = _step_into_list(node, key, override, last, value)
        elif isinstance(node, dict):
            if last:
                node[key] = value
            else:
                node = node.setdefault(key, {}) if node.get(key) is not None else _new(node, key)
        else:
            raise ConfigError(
                f"The override {override!r} goes below {'.'.join(keys[:depth])}, which is a value"
            )


def _new(node: dict[str, Any], key: str) -> dict[str, Any]:
    child: dict[str, Any] = {}
    node[key] = child
    return child


def _step_into_list(node: list[Any], key: str, override: str, last: bool, value: Any) -> Any:
    if not key.isdigit() or int(key) >= len(node):
        raise ConfigError(
            f"The override {override!r} needs a position from 0 to {len(node) - 1}, not {key!r}"
        )
    if last:
        node[int(key)] = value
    return node[int(key)]
