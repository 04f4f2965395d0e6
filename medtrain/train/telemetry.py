"""What a training run tells while it goes: metrics for the report, progress for a person.

The trainer's log lines, the meter's figures in them → one JSON object a line in the metrics file
(on resume, lines after the resumed step are dropped first) → the console's bar: loss, learning
rate, tokens a second. The same callback saves between evaluations, and stops a run early.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from medtrain.console import ProgressTask
from medtrain.errors import MedtrainError
from medtrain.files import write_bytes
from medtrain.train.checkpoints import evaluations_since_best
from medtrain.train.speed import SPEED_FIGURES

_NAMES = {
    "loss": "loss",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "num_tokens": "tokens",
    "mean_token_accuracy": "token_accuracy",
    "rewards/margins": "rewards_margin",
    "rewards/accuracies": "rewards_accuracy",
    "rewards/chosen": "rewards_chosen",
    "rewards/rejected": "rewards_rejected",
    "logps/chosen": "logps_chosen",
    "logps/rejected": "logps_rejected",
    "kl": "kl",
    "nll_loss": "nll_loss",
}
"""The trainer's names of the figures we keep, and ours."""


def metrics_line(logs: Mapping[str, Any], step: int) -> dict[str, Any] | None:
    """The metrics of one log line of the trainer; None for a line that is about neither loss."""
    kind, prefix = ("eval", "eval_") if "eval_loss" in logs else ("train", "")
    if f"{prefix}loss" not in logs:
        return None
    line: dict[str, Any] = {"step": step, "epoch": round(logs.get("epoch", 0.0), 4), "kind": kind}
    for theirs, ours in _NAMES.items():
        value = logs.get(prefix + theirs)
        # JSON has no word for the norm of a gradient that is no number.
        if value is not None and (ours == "loss" or math.isfinite(value)):
            line[ours] = int(value) if ours == "tokens" else float(value)
    line.update({name: logs[name] for name in SPEED_FIGURES if name in logs})
    return line


def keep_metrics_until(path: Path, step: int) -> None:
    """Drop the lines after `step`, and a line that a killed process left half written."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if line.endswith(b"\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            continue
    write_bytes(path, b"".join(kept))


class Telemetry(TrainerCallback):  # type: ignore[misc]
    """Metrics, progress, and two decisions: when to save besides, and when to stop early."""

    def __init__(
        self,
        metrics: Path | None,
        progress: ProgressTask,
        *,
        early_stopping: int = 0,
        checkpoint_steps: int | None = None,
    ) -> None:
        """`metrics` is None in processes that do not keep the books."""
        self._metrics, self._progress = metrics, progress
        self._early_stopping, self._checkpoint_steps = early_stopping, checkpoint_steps
        self._figures: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show where a resumed training begins."""
        self._progress.update(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save between evaluations too, where that is wanted."""
        every = self._checkpoint_steps
        if every and state.global_step % every == 0:
            control.should_save = True
        self._progress.update(state.global_step, **self._figures)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop when the loss has not become lower for long enough."""
        patience = self._early_stopping
        if patience and evaluations_since_best(state.log_history) >= patience:
            control.should_training_stop = True

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, Any], **kwargs: Any
    ) -> None:
        """Write the line and remember what the bar shows.

        Raises:
            MedtrainError: the loss is not a number any more.
        """
        line = metrics_line(logs, state.global_step)
        if line is None:
            return
        if not math.isfinite(line["loss"]):
            raise MedtrainError(
                f"The {line['kind']} loss is {line['loss']} at step {line['step']}",
                fix="Lower the learning rate, and prefer model.dtype=bfloat16 or float32 to "
                "float16.",
            )
        if line["kind"] == "train":
            self._figures = self._shown(line)
        if self._metrics is not None:
            with self._metrics.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(line) + "\n")

    def _shown(self, line: Mapping[str, Any]) -> dict[str, float]:
        shown = {"loss": line["loss"], "lr": line.get("learning_rate", 0.0)}
        if "rewards_margin" in line:
            shown["margin"] = line["rewards_margin"]
        if "tokens_per_s" in line:
            shown["tokens_per_s"] = line["tokens_per_s"]
        return shown


def tokens_seen(history: list[dict[str, Any]]) -> int:
    """The trainer's running count of tokens at the end of its log."""
    return int(max((line.get("num_tokens", 0) for line in history), default=0))
