"""Data card, manifest, receipts and configuration → where the numbers come from.

Paths lose their directories, and figures that depend on the clock or on how (not what) was computed
are left out: a report can be handed to others, and compared byte by byte with that of a second run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medtrain.config import RunConfig
from medtrain.report.inputs import Inputs
from medtrain.report.schema import DataFacts, Lineage, Source, Stage
from medtrain.report.text import clean_text

_TRAINING = {
    "lora", "epochs", "max_steps", "learning_rate", "batch_size", "gradient_accumulation",
    "scheduler", "warmup_ratio", "weight_decay", "max_grad_norm", "optimizer", "max_length",
    "validation_fraction", "early_stopping", "keep_best",
}  # fmt: skip
_ANSWERING = {"temperature", "top_k", "top_p", "max_new_tokens"}
_SETTINGS = {
    "model": {"quantization", "double_quantization", "dtype", "chat_template", "system_prompt"},
    "sft": _TRAINING | {"loss_on", "packing"},
    "dpo": _TRAINING - {"lora"}
    | {"method", "beta", "loss_type", "label_smoothing", "desirable_weight", "undesirable_weight"},
    "merge": {"into"},
    "generate": _ANSWERING | {"num_samples"},
    "judge": {"orders", "temperature", "rating_scale"},
    "evaluate": _ANSWERING | {"max_judged"},
}
"""What a reader needs to repeat the run."""

_CLOCK = re.compile(
    r"(^|_)(s|ms|seconds?|minutes?|hours?|runtime|time|elapsed|at|host|hostname|pid|job_id)$"
    r"|_per_s(ec(ond)?)?$|^(resumed|attempts?|restarts?|cached|skipped_rows)(_|$)"
)
_LONGEST_TEXT = 80


def without_directories(name: str) -> str:
    """A hub id or `builtin:` name as it is; of a local path the last part only."""
    text = clean_text(name)
    is_path = text.startswith(("/", ".", "~")) or text.count("/") > 1
    return (Path(text).name or text) if is_path else text


def settings_of(config: RunConfig) -> dict[str, Any]:
    """The settings that explain the numbers."""
    shown = {**_SETTINGS, "dpo": _SETTINGS["dpo"] - config.dpo.unread}
    sections = config.model_dump(mode="json", include=shown)
    sections["model"]["chat_template"] = without_directories(config.model.chat_template)
    return sections


def data_of(card: Mapping[str, Any], config: RunConfig) -> DataFacts | None:
    """Sources, splits and rejections of a data card."""
    if not card:
        return None
    over_limit = card.get("over_limit", 0)
    return DataFacts(
        sources=[_source(source) for source in card["sources"]],
        splits=card["splits"],
        rejected={**card["rejected"], **({"over a limit": over_limit} if over_limit else {})},
    )


def lineage_of(inputs: Inputs, config: RunConfig, stand_in: bool) -> Lineage:
    """Versions, seeds, and what each stage before the report counted."""
    order = list(inputs.manifest.get("stages", {}))
    receipts = [r for r in inputs.receipts if r.get("stage") not in (None, "report")]
    receipts.sort(key=lambda r: (_position(order, r["stage"]), r["stage"]))
    return Lineage(
        versions={k: str(v) for k, v in inputs.manifest.get("versions", {}).items()},
        seeds={"run": config.seed, "data": config.data.seed},
        stages=[
            Stage(
                name=receipt["stage"],
                counts=figures(receipt.get("counts", {})),
                stand_in=stand_in and receipt["stage"] in ("judge", "pairs"),
            )
            for receipt in receipts
        ],
    )


def _position(order: list[str], stage: str) -> int:
    return order.index(stage) if stage in order else len(order)


def figures(counts: Mapping[str, Any], prefix: str = "") -> dict[str, int | float | str]:
    """The counts of a receipt that are the same whenever the stage is run, with dotted names."""
    found: dict[str, int | float | str] = {}
    for key, value in counts.items():
        if _CLOCK.search(key) or key == "stand_in":
            continue
        if isinstance(value, Mapping) and not prefix:
            found.update(figures(value, f"{key}."))
        elif isinstance(value, bool):
            found[prefix + key] = "yes" if value else "no"
        elif isinstance(value, (int, float)) or _is_word(value):
            found[prefix + key] = value
    return found


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _LONGEST_TEXT and "/" not in value


def _source(source: Mapping[str, Any]) -> Source:
    path, inputs = source["path"], source["inputs"]
    paths = path if isinstance(path, list) else [path]
    losses = ("duplicates", "near_duplicates", "contaminated", "over_limit")
    not_used = {**source["rejected"], **{name: source[name] for name in losses}}
    return Source(
        name=source["adapter"],
        path=", ".join(without_directories(one) for one in paths),
        subset=source["subset"],
        commit=next((one["commit"] for one in inputs if one["commit"]), None),
        license=source["licence"],
        files={Path(f["path"]).name: f["sha256"] for one in inputs for f in one["files"]},
        read=source["read"],
        not_used={name: count for name, count in not_used.items() if count},
        splits={name: count for name, count in source["splits"].items() if count},
    )
