"""What a run lacks that is better said now than after hours of training."""

from __future__ import annotations

from collections.abc import Collection
from importlib.util import find_spec

from medtrain.config import RunConfig
from medtrain.config.lora_path import why_not_fused
from medtrain.endpoint import key_from_environment
from medtrain.errors import ConfigError
from medtrain.run import Run


def check_place(run: Run) -> None:
    """Refuse a run directory that cannot be one, before anything asks what is in it.

    Raises:
        ConfigError: something else is in its place.
    """
    nearest = next(path for path in (run.root, *run.root.absolute().parents) if path.exists())
    if not nearest.is_dir():
        run.create()  # says why it cannot


def check_key(config: RunConfig, undone: Collection[str], also: Collection[str] = ()) -> None:
    """Ask for the judge's key.

    Args:
        config: the run's.
        undone: names of the stages that will run.
        also: names of variables that jobs will have besides this process's.

    Raises:
        ConfigError: one of those stages will ask OpenAI's endpoint without a key.
    """
    judge, evaluate = config.judge, config.evaluate
    if judge.kind != "openai" or judge.base_url or judge.api_key_env in also:
        return
    if key_from_environment(judge.api_key_env):
        return
    asks = {
        "judge": any(s.adapter != "preferences" for s in config.data.sources),
        "evaluate": evaluate.rubric or evaluate.rating or evaluate.pairwise,
    }
    for stage in ("judge", "evaluate"):
        if asks[stage] and stage in undone:
            raise ConfigError(
                f"{stage} asks OpenAI's {judge.model}, but {judge.api_key_env} is not set",
                fix=f"export {judge.api_key_env}=…, or set judge.base_url to a server of your "
                "own, or judge.kind=model, or judge.kind=rules to try the pipeline.",
            )


def check_packages(config: RunConfig) -> None:
    """Look for the packages that the settings of training name, without importing them, and for
    settings that exclude each other.

    Raises:
        ConfigError: one is not installed here, or two cannot be together.
    """
    why_not_fused(config, config.train.strategy)
    for tracker in config.train.trackers:
        if not _is_installed(tracker):
            raise ConfigError(
                f"train.trackers: {tracker} is not installed",
                fix=f"pip install {tracker}, or leave it out: the run's logs/ have the metrics "
                "anyway.",
            )
    if config.model.attention.startswith("flash") and not _is_installed("flash_attn"):
        raise ConfigError(
            f"model.attention={config.model.attention} needs the package flash-attn",
            fix="pip install flash-attn, or leave model.attention at auto: it is taken where it is "
            "installed.",
        )
    if config.train.liger is True and not _is_installed("liger_kernel"):
        raise ConfigError(
            "train.liger=true needs the package liger-kernel",
            fix="pip install liger-kernel, or leave train.liger at auto.",
        )


def _is_installed(package: str) -> bool:
    """A directory of that name, such as W&B makes where it runs, is no package."""
    found = find_spec(package)
    return found is not None and found.loader is not None
