"""What the stage `dpo` does alike, whichever method it trains with.

preferences → the method's rows as token ids → the base as in SFT, the SFT adapter on it, trainable
→ the method's trainer, fed with its rows → dpo/adapter and logs/dpo.metrics.jsonl. All methods go
on from the SFT adapter, because the answers that were judged are those of the SFT model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from medtrain.config import DPOConfig, RunConfig
from medtrain.console import Console
from medtrain.data.tokenizer import load_chat_tokenizer
from medtrain.run import Run
from medtrain.train.adapter import attach_adapter, read_weights
from medtrain.train.checkpoints import Plan
from medtrain.train.fit import Fit
from medtrain.train.model import load_base, packs
from medtrain.train.rows import Rows, tell_counts
from medtrain.train.step import Fed
from medtrain.train.trainer_settings import make_plan, strategy_here

if TYPE_CHECKING:
    from medtrain.data.chat import ChatTokenizer


class Prepared(NamedTuple):
    """What a method feeds its trainer from."""

    run: Run
    config: RunConfig
    chat: ChatTokenizer
    rows: Rows
    plan: Plan
    packed: bool
    """Whether rows are computed without padding."""

    @property
    def section(self) -> DPOConfig:
        """The stage's configuration."""
        return self.config.dpo


class Method(NamedTuple):
    """One way to learn from preferences."""

    rows: Callable[[Run, RunConfig, ChatTokenizer], Rows]
    """Makes token ids of the preferences, training rows and validation rows."""
    settings: Callable[..., Any]
    """Makes TRL's configuration; called as trainer_settings.dpo_settings is."""
    trainer: Callable[..., Any]
    feed: Callable[[Prepared], Fed]
    checked: bool
    """Whether its trainer has `check_start`, for there is a reference."""


def train_preferences(
    run: Run, config: RunConfig, console: Console, method: Method
) -> dict[str, Any]:
    """Train the adapter of the stage `dpo`, or go on with it; returns counts and losses.

    Raises:
        ConfigError: optimiser or trainer fields are wrong, the GPU is too small, or the checkpoints
            are of processes that cannot be gone on from with these.
        DataError: there is no preference pair, no SFT adapter, or no reference.
        AdapterMismatchError: the SFT adapter does not fit the base.
        StoppedError: it was asked to stop, and has saved.
        MedtrainError: policy and reference differ at the start, the loss is no number, or nothing
            was learnt.
    """
    chat = load_chat_tokenizer(run)
    rows = method.rows(run, config, chat)
    tell_counts(rows.counts, "dpo", console)
    packed = packs(run, config, "dpo")
    plan = make_plan(config.dpo, len(rows.train), strategy_here())
    fit = Fit(run, config, "dpo", chat, plan, console)
    with fit.stop.listening():
        # Before the settings, which tell libraries of DeepSpeed: it shards a model that is whole.
        base = load_base(
            run, config, chat, quantized=config.model.quantization == "nf4", packed=packed
        )
        model = attach_adapter(base, run.adapter("sft"), trainable=True)
        settings = method.settings(
            run, config, plan, validated=rows.validation is not None, console=console
        )
        trainer = method.trainer(
            model=model,
            plan=plan,
            args=settings,
            train_dataset=rows.train.dataset,
            eval_dataset=rows.validation.dataset if rows.validation else None,
            processing_class=chat.tokenizer,
        )
        fit.feed(trainer, method.feed(Prepared(run, config, chat, rows, plan, packed)))
        if method.checked:
            trainer.check_start()
        before = read_weights(run.adapter("sft"))
        return {**rows.counts.to_json(), **fit.train(trainer, before=before)}
