"""Supervised fine-tuning: a LoRA adapter learns to give the reference answers.

training rows → token ids with labels on the answers → the base, in 4 bits where asked → a fresh
adapter, with the rows of new tokens → TRL's SFTTrainer → sft/adapter and logs/sft.metrics.jsonl.
"""

from __future__ import annotations

from typing import Any

from medtrain.config import RunConfig
from medtrain.console import Console
from medtrain.data.tokenizer import load_chat_tokenizer
from medtrain.run import Run
from medtrain.train.adapter import add_adapter
from medtrain.train.feeding import feed_supervised
from medtrain.train.fit import Fit
from medtrain.train.model import load_base, packs
from medtrain.train.rows import sft_rows, tell_counts
from medtrain.train.trainer_settings import make_plan, sft_settings, strategy_here
from medtrain.train.trainers import SupervisedTrainer


def train_sft(run: Run, config: RunConfig, console: Console) -> dict[str, Any]:
    """Train the SFT adapter, or go on with it; returns counts and losses.

    Raises:
        ConfigError: targets, optimiser or trainer fields are wrong, the GPU is too small, or the
            checkpoints are of processes that cannot be gone on from with these.
        DataError: there is nothing to train on.
        StoppedError: it was asked to stop, and has saved.
        MedtrainError: the loss is no number, or nothing was learnt.
    """
    chat = load_chat_tokenizer(run)
    rows = sft_rows(run, config, chat)
    tell_counts(rows.counts, "sft", console)
    packed = packs(run, config, "sft")
    plan = make_plan(config.sft, len(rows.train), strategy_here())
    fit = Fit(run, config, "sft", chat, plan, console)
    with fit.stop.listening():
        # Before the settings, which tell libraries of DeepSpeed: it shards a model that is whole.
        base = load_base(
            run, config, chat, quantized=config.model.quantization == "nf4", packed=packed
        )
        model = add_adapter(base, config.sft.lora, chat, seed=config.seed)
        settings = sft_settings(
            run, config, plan, validated=rows.validation is not None, console=console
        )
        trainer = SupervisedTrainer(
            model=model,
            plan=plan,
            args=settings,
            train_dataset=rows.train.dataset,
            eval_dataset=rows.validation.dataset if rows.validation else None,
            processing_class=chat.tokenizer,
        )
        fed = feed_supervised(
            rows, config.sft, plan, seed=config.seed, pad_token_id=chat.pad_token_id, packed=packed
        )
        fit.feed(trainer, fed)
        return {**rows.counts.to_json(), **fit.train(trainer, before=None)}
