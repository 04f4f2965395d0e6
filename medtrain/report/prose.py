"""Document → report.md and MODEL_CARD.md.

Every value a template prints is escaped for Markdown by the environment's `finalize`; what is
Markdown already says so with `as_is`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from medtrain.config import RunConfig
from medtrain.data.reading import is_local
from medtrain.report.catalogue import shown
from medtrain.report.page import amount, flat_settings
from medtrain.report.schema import Document
from medtrain.report.svg import Drawing
from medtrain.report.tables import table_of
from medtrain.report.text import count_of, listed, markdown

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class _Spoken(NamedTuple):
    """A way to learn from preferences, as readers and model hubs know it."""

    name: str
    tag: str


_METHODS = {
    "dpo": _Spoken("direct preference optimisation", "dpo"),
    "orpo": _Spoken("odds ratio preference optimisation", "orpo"),
    "kto": _Spoken("Kahneman-Tversky optimisation", "kto"),
    "rejection": _Spoken("fine-tuning on the judge's best answers", "rejection-sampling"),
}


def render_markdown(document: Document, config: RunConfig, figures: dict[str, Drawing]) -> str:
    """report.md."""
    return _render(
        "report.md.jinja",
        document,
        figures={name: drawing.title for name, drawing in figures.items()},
        made_by=_made_by(config, _trained(document)),
    )


def render_model_card(document: Document, config: RunConfig) -> str:
    """MODEL_CARD.md, with the metadata block that model hubs read."""
    trained = _trained(document)
    settings = flat_settings(document)
    keys = {key: None for stage in trained for key in settings[stage]}
    return _render(
        "model_card.md.jinja",
        document,
        front_matter=_front_matter(document, config, trained),
        made_by=_made_by(config, trained),
        trained=trained,
        training_rows={k: [settings[s].get(k, "") for s in trained] for k in keys},
        weights="4-bit NF4" if config.model.quantization == "nf4" else "not quantised",
        settings=settings,
    )


def _trained(document: Document) -> list[str]:
    return [stage for stage in ("sft", "dpo") if stage in document.training]


def _render(template: str, document: Document, **values: Any) -> str:
    environment = Environment(
        loader=PackageLoader("medtrain.report"),
        # Markdown is not HTML: finalize escapes for it, HTML's special characters included.
        autoescape=False,
        finalize=lambda value: value if isinstance(value, Markup) else markdown(value),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals.update(
        doc=document, table=table_of(document), amount=amount, count_of=count_of, as_is=Markup,
        share=lambda value: shown(value, 1, True),
        spoken=lambda key: key.replace("_", " ").replace(".", ": "),
    )  # fmt: skip
    text = environment.get_template(template).render(**values)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _front_matter(document: Document, config: RunConfig, trained: list[str]) -> str:
    """YAML of what is known; a licence is not, so a person adds it."""
    base = config.model.base
    adapter = "qlora" if config.model.quantization == "nf4" else "lora"
    tags = {"sft": "sft", "dpo": _METHODS[config.dpo.method].tag}
    methods = [adapter, *(tags[stage] for stage in trained)]
    return yaml.safe_dump(
        {
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            **({"base_model": base} if _is_on_hub(base) else {}),
            **({"datasets": ids} if (ids := _hub_datasets(config)) else {}),
            "tags": ["medtrain", "medical", "question-answering", *(methods if trained else [])],
        },
        sort_keys=False,
        allow_unicode=True,
    )


def _is_on_hub(model: str) -> bool:
    return bool(_HUB_ID.fullmatch(model)) and not Path(model).is_dir()


def _hub_datasets(config: RunConfig) -> list[str]:
    """Hub ids of the sources that something was trained on."""
    used = [source.path for source in config.data.sources if source.use != "eval"]
    paths = [path for p in used for path in (p if isinstance(p, list) else [p])]
    return [path for path in paths if _HUB_ID.fullmatch(path) and not is_local(path)]


def _made_by(config: RunConfig, trained: list[str]) -> str:
    """How the base became this model."""
    adapter = "QLoRA" if config.model.quantization == "nf4" else "LoRA"
    names = {"sft": "supervised fine-tuning", "dpo": _METHODS[config.dpo.method].name}
    if not trained:
        return "evaluated"
    return f"trained by {listed([names[stage] for stage in trained])} ({adapter})"
