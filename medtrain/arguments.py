"""What the verbs of the command line take, and how a CONFIG or RUN becomes a run.

A CONFIG is a YAML file or a run directory; a RUN is either as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    from medtrain.config import RunConfig
    from medtrain.run import Run

_PLACES = ("name", "output_dir")

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file or run directory.")]
Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045 - typer reads it at run time on Python 3.10
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as sft.epochs=2."),
]
Force = Annotated[bool, typer.Option("--force", help="Run it even if it is finished.")]


From = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--from", metavar="STAGE", help="Begin here; what is before must be done."),
]
Until = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--until", metavar="STAGE", help="End after this stage."),
]
Only = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--only", metavar="STAGE", help="This stage and no other."),
]
Forced = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--force", metavar="STAGE", help="Run this stage even if it is finished."),
]
RunPath = Annotated[str, typer.Argument(metavar="RUN", help="Run directory or CONFIG.")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable.")]


def load(config: str, overrides: list[str] | None) -> tuple[RunConfig, Run]:
    """The configuration, and the run it is about.

    Raises:
        ConfigError: it is wrong.
    """
    from medtrain.config import load_config
    from medtrain.run import Run

    loaded = load_config(config, overrides or [])
    path = Path(config)
    directory = path if path.is_dir() else path.parent
    elsewhere = any(o.partition("=")[0].strip() in _PLACES for o in overrides or ())
    if not elsewhere and (directory / "config.yaml").exists() and (directory / "stages").is_dir():
        # A run directory is itself wherever it was moved to.
        return loaded, Run(directory)
    return loaded, Run(Path(loaded.output_dir).expanduser() / loaded.name)
