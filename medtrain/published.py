"""Whether what would be uploaded is what the configuration says."""

from __future__ import annotations

from medtrain.config import RunConfig
from medtrain.console import Console
from medtrain.errors import DataError
from medtrain.pipeline import Pipeline
from medtrain.run import Run
from medtrain.stages import STAGES, needed_before


def check_published(run: Run, config: RunConfig, what: str, trained: str) -> None:
    """Refuse to publish a model that is not what the configuration says.

    Raises:
        DataError: the stage that makes it, or the report, is not up to date.
    """
    pipeline = Pipeline(run, config, Console(quiet=True))
    maker = trained if what == "adapter" else f"merge-{trained}"
    for last in (stage for stage in STAGES if stage.name in (maker, "report")):
        for stage in (*needed_before(last, run, config), last):
            standing = pipeline.standing(stage)
            # What has no receipt was made by hand; whether it is there, the upload will see.
            if standing.state in ("stale", "started"):
                reason = f" ({standing.why})" if standing.why else ""
                raise DataError(
                    f"{stage.name} is {standing.state}{reason}: what would be uploaded is not what "
                    "the configuration says",
                    fix=f"medtrain run {run.config}",
                )
