"""What all training does alike, whichever method it trains with.

rows of the method as token ids → the base, in 4 bits where asked → a fresh adapter for SFT, for DPO
the one of SFT → the method's trainer, fed with its rows → <stage>/adapter and the stage's metrics.
All ways to learn from preferences go on from the SFT adapter, because the answers that were judged
are those of the SFT model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from medtrain.config import RunConfig
from medtrain.console import Console
from medtrain.data.tokenizer import load_chat_tokenizer
from medtrain.run import Run, Trained
from medtrain.train.adapter import add_adapter, attach_adapter, read_weights
from medtrain.train.checkpoints import Plan
from medtrain.train.computing import tell_attention, tell_waits, warn_of_float32
from medtrain.train.evaluating import Fed
from medtrain.train.fit import Fit
from medtrain.train.fsdp import refuse_new_tokens
from medtrain.train.fused_lora import fuse_where_it_fits, tell_lora
from medtrain.train.model import load_base, packs
from medtrain.train.rows import Rows, tell_counts
from medtrain.train.sharded import do_without_compiled_op
from medtrain.train.trainer_settings import Fields, make_plan, strategy_here, trainer_settings

if TYPE_CHECKING:
    from medtrain.data.chat import ChatTokenizer


class Prepared(NamedTuple):
    """What a method feeds its trainer from."""

    run: Run
    config: RunConfig
    section: Any
    """The stage's: SFTConfig or DPOConfig."""
    chat: ChatTokenizer
    rows: Rows
    plan: Plan
    packed: bool
    """Whether rows are computed without padding."""


class Method(NamedTuple):
    """One way to train."""

    rows: Callable[[Run, RunConfig, ChatTokenizer], Rows]
    """Makes token ids, training rows and validation rows."""
    fields: Fields
    """Of TRL's configuration."""
    trainer: Callable[..., Any]
    feed: Callable[[Prepared], Fed]
    checked: bool = False
    """Whether its trainer has `check_start`, for there is a reference."""


def train(
    method: Method, run: Run, config: RunConfig, stage: Trained, console: Console
) -> dict[str, Any]:
    """Train a stage's adapter, or go on with it; returns counts and losses.

    Raises:
        ConfigError: targets, optimiser or trainer fields are wrong, the GPU is too small, or the
            checkpoints are of processes that cannot be gone on from with these.
        DataError: something that the method learns from is not there.
        AdapterMismatchError: the SFT adapter does not fit the base.
        StoppedError: it was asked to stop, and has saved.
        MedtrainError: policy and reference differ at the start, the loss is no number, or nothing
            was learnt.
    """
    section = getattr(config, stage)
    chat = load_chat_tokenizer(run)
    if strategy_here() == "fsdp2":
        refuse_new_tokens(chat.new_token_ids)
    rows = method.rows(run, config, chat)
    tell_counts(rows.counts, stage, console)
    packed = packs(run, config, stage)
    plan = make_plan(section, len(rows.train), strategy_here())
    fit = Fit(run, config, stage, chat, plan, console)
    with fit.stop.listening():
        # Before the settings, which tell libraries of DeepSpeed: it shards a model that is whole.
        base = load_base(
            run, config, chat, quantized=config.model.quantization == "nf4", packed=packed
        )
        tell_attention(base, stage, console, packed=packed)
        warn_of_float32(config, stage, console)
        if stage == "sft":
            model, before = add_adapter(base, config.sft.lora, chat, seed=config.seed), None
        else:
            start = run.adapter("sft")
            model, before = attach_adapter(base, start, trainable=True), read_weights(start)
        tell_lora(fuse_where_it_fits(model, config, plan.strategy), stage, console)
        if plan.strategy.startswith("zero") and not torch.cuda.is_available():
            do_without_compiled_op()
        validated = rows.validation is not None
        settings = trainer_settings(
            method.fields, run, config, stage, plan, validated=validated, console=console
        )
        tell_waits(settings, plan, stage, console)
        trainer = method.trainer(
            model=model,
            plan=plan,
            args=settings,
            train_dataset=rows.train.dataset,
            eval_dataset=rows.validation.dataset if rows.validation else None,
            processing_class=chat.tokenizer,
        )
        prepared = Prepared(run, config, section, chat, rows, plan, packed)
        fit.feed(trainer, method.feed(prepared))
        if method.checked:
            trainer.check_start(console)
        return {**rows.counts.to_json(), **fit.train(trainer, before=before)}
