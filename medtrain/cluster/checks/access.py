"""Secrets and the hub: present where a run needs them, closed to others, and never shown.

Only the names of variables and files appear in a finding. A key counts as present when it is in
this environment, or named in `cluster.secrets_file`, which jobs read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from medtrain.cluster.checks.finding import Finding, failed, passed, skipped, warned
from medtrain.config import RunConfig
from medtrain.config.cluster import ClusterConfig
from medtrain.endpoint import without_credentials

HUB_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_LOCAL_HOSTS = {"localhost", "127.0.0.1", "::1", "0.0.0.0"}
_TRUE = {"1", "true", "yes", "on"}


def check_access(config: RunConfig | None, site: ClusterConfig, *, cluster: bool) -> list[Finding]:
    """Tokens, the judge's and the engines' keys, the secrets file, and the hub cache."""
    found = [_secrets_file(site)] if site.secrets_file else []
    if config is None:
        return [*found, skipped("tokens", "no CONFIG given that says which are needed")]
    known = set(os.environ) | set(_names_in(site))
    found.append(_hub_token(config, known))
    found += _keys(config, known)
    if (cluster and site.offline) or os.environ.get("HF_HUB_OFFLINE", "").lower() in _TRUE:
        found.append(_hub_cache(config, site))
    return found


def _secrets_file(site: ClusterConfig) -> Finding:
    path = Path(site.secrets_file or "").expanduser()
    try:
        status = path.stat()
    except OSError as error:
        return failed("secrets file", f"{path}: {error.strerror}",
                      f"(umask 077; $EDITOR {path}), with NAME=value lines")  # fmt: skip
    mode = status.st_mode & 0o777
    facts = {"path": str(path), "mode": f"{mode:04o}"}
    if mode & 0o077:
        return failed("secrets file", f"{path} has mode {mode:04o}: others may read it",
                      f"chmod 600 {path}", **facts)  # fmt: skip
    if status.st_uid not in (os.getuid(), 0):
        return failed("secrets file", f"{path} belongs to another user",
                      "Use a file of your own.", **facts)  # fmt: skip
    names = len(list(_names_in(site)))
    return passed("secrets file", f"{path}, mode {mode:04o}, {names} names", **facts)


def _names_in(site: ClusterConfig) -> Iterator[str]:
    """The names, never the values, in the secrets file."""
    if not site.secrets_file:
        return
    try:
        text = Path(site.secrets_file).expanduser().read_text(encoding="utf-8", errors="replace")
    except OSError:
        return  # `_secrets_file` tells of it
    for line in text.splitlines():
        name, separator, value = line.strip().removeprefix("export ").partition("=")
        if separator and value and not name.startswith("#"):
            yield name.strip()


def hub_id(config: RunConfig) -> str | None:
    """The base's hub id; None where it is built or lies in a directory."""
    base = config.model.base
    if base.startswith(("builtin:", "/", ".", "~")) or base.count("/") > 1:
        return None
    return None if Path(base).expanduser().is_dir() else base


def _hub_token(config: RunConfig, known: set[str]) -> Finding:
    base = hub_id(config)
    if base is None:
        return skipped("hub token", "the base comes from no hub")
    present = next((name for name in HUB_TOKENS if name in known), None)
    stored = Path(os.environ.get("HF_TOKEN_PATH") or _hf_home() / "token")
    if present:
        return passed("hub token", f"{present} is set")
    if not stored.is_file():
        return warned("hub token", f"none; enough for {base} only if it is a public model",
                      "export HF_TOKEN=… or `hf auth login`")  # fmt: skip
    mode = stored.stat().st_mode & 0o777
    if mode & 0o077:
        return warned("hub token", f"{stored} has mode {mode:04o}: others may read it",
                      f"chmod 600 {stored}")  # fmt: skip
    return passed("hub token", f"in {stored}")


def _keys(config: RunConfig, known: set[str]) -> Iterator[Finding]:
    if config.judge.kind == "openai":
        yield _key("judge key", config.judge.base_url, config.judge.api_key_env, known)
    for name, engine in (("generate", config.generate), ("evaluate", config.evaluate)):
        if engine.engine == "openai":
            yield _key(f"{name} key", engine.base_url, engine.api_key_env, known)


def _key(check: str, base_url: str | None, variable: str, known: set[str]) -> Finding:
    if variable in known:
        return passed(check, f"{variable} is set")
    if base_url and urlsplit(base_url).hostname in _LOCAL_HOSTS:
        return skipped(check, "an endpoint of this machine needs none")
    fix = f"export {variable}=… in the shell that submits, or put it into cluster.secrets_file"
    if base_url is None:
        return failed(check, f"{variable} is not set, and OpenAI's own endpoint is asked", fix)
    where = without_credentials(base_url)
    return warned(check, f"{variable} is not set; {where} may ask for a key", fix)


def _hf_home(site: ClusterConfig | None = None) -> Path:
    """Where the hub's files are kept, of jobs where a site is given."""
    chosen = (site.hf_home or site.environment.get("HF_HOME")) if site else None
    default = str(Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface")
    return Path(chosen or os.environ.get("HF_HOME") or default).expanduser()


def hub_cache(site: ClusterConfig) -> Path:
    """The directory of downloaded models that jobs read."""
    own = None if site.hf_home else os.environ.get("HF_HUB_CACHE")
    chosen = site.environment.get("HF_HUB_CACHE") or own
    return Path(chosen).expanduser() if chosen else _hf_home(site) / "hub"


def _hub_cache(config: RunConfig, site: ClusterConfig) -> Finding:
    """Whether nodes without a network find the whole base."""
    base = hub_id(config)
    if base is None:
        return skipped("hub cache", "the base comes from no hub")
    from huggingface_hub import try_to_load_from_cache

    cache = hub_cache(site)
    fix = "On a machine with a network: medtrain prepare --fetch CONFIG"
    card = try_to_load_from_cache(
        base, "config.json", cache_dir=cache, revision=config.model.revision
    )
    if not isinstance(card, str):
        return failed("hub cache", f"{base} is not in {cache}, and jobs are offline", fix)
    snapshot = Path(card).parent
    missing = _missing_weights(snapshot)
    if missing:
        return failed("hub cache", f"{base} is incomplete in {cache}: no {missing}", fix)
    return passed("hub cache", f"{base} is in {cache}", snapshot=str(snapshot))


def _missing_weights(snapshot: Path) -> str:
    """A file of weights that is not there; empty where all are."""
    index = snapshot / "model.safetensors.index.json"
    if index.exists():
        wanted = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return next((name for name in sorted(wanted) if not (snapshot / name).exists()), "")
    return "" if any(snapshot.glob("*.safetensors")) else "*.safetensors"
