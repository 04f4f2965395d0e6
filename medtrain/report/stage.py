"""The report stage: read what the run measured → Document → JSON, Markdown, figures, one page.

All files are written into a directory beside the report, which then takes the report's place: a
reader sees the old report or the new one. The same run gives the same bytes.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from medtrain.config import RunConfig
from medtrain.console import Console
from medtrain.files import fsync_directory, write_json, write_text
from medtrain.report.document import build_document
from medtrain.report.figures import figures_of
from medtrain.report.inputs import read_inputs, read_questions
from medtrain.report.page import asset, render_page
from medtrain.report.prose import render_markdown, render_model_card
from medtrain.report.schema import Document
from medtrain.report.screen import screen_of
from medtrain.run import Run


def report(run: Run, config: RunConfig, console: Console) -> dict[str, Any]:
    """Write the report of a run and show its gist.

    Raises:
        DataError: nothing was evaluated yet, or a file of the run is damaged.
    """
    document = build_document(read_inputs(run), config, run.name)
    questions = read_questions(run, config.report.max_examples)
    staging = run.report.with_name(".tmp-report")
    shutil.rmtree(staging, ignore_errors=True)
    figures = write_report(staging, document, config, questions)
    _take_place(staging, run.report)
    page = run.report / "index.html"
    console.event("report", f"report at {page}", path=str(page))
    console.show(screen_of(document, page))
    return {
        "variants": len(document.variants),
        "measures": len(document.measures),
        "questions_shown": len(questions),
        "figures": figures,
    }


def write_report(
    directory: Path, document: Document, config: RunConfig, questions: list[dict[str, Any]]
) -> int:
    """All files of a report; returns the number of figures."""
    figures = figures_of(document)
    style = asset("colours.css") + asset("figure.css")
    write_json(directory / "report.json", document.model_dump(mode="json"))
    write_text(directory / "report.md", render_markdown(document, config, figures))
    write_text(directory / "MODEL_CARD.md", render_model_card(document, config))
    write_text(directory / "index.html", render_page(document, figures, questions))
    for name, drawing in figures.items():
        write_text(directory / "figures" / f"{name}.svg", drawing.standalone(style))
    return len(figures)


def _take_place(staging: Path, place: Path) -> None:
    """Rename a finished directory to its place; what stood there is removed after."""
    old = place.with_name(".tmp-report-old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    staging.rename(place)
    fsync_directory(place.parent)
    shutil.rmtree(old, ignore_errors=True)
