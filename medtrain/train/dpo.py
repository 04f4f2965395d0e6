"""Direct preference optimisation: the SFT adapter learns to prefer the better answers.

preference pairs and the reference's log probabilities of them → token ids → the base as in SFT, the
SFT adapter on it, trainable → checked: before a step, policy and reference agree → TRL's DPOTrainer
→ dpo/adapter and logs/dpo.metrics.jsonl.
"""

from __future__ import annotations

from typing import Any

from medtrain.config import RunConfig
from medtrain.console import Console
from medtrain.data.tokenizer import load_chat_tokenizer
from medtrain.run import Run
from medtrain.train.adapter import attach_adapter, read_weights
from medtrain.train.feeding import feed_preferences, pair_collate
from medtrain.train.fit import Fit
from medtrain.train.model import load_base, packs
from medtrain.train.reference import read_reference
from medtrain.train.rows import dpo_rows, tell_counts
from medtrain.train.trainer_settings import dpo_settings, make_plan, strategy_here
from medtrain.train.trainers import PreferenceTrainer


def train_dpo(run: Run, config: RunConfig, console: Console) -> dict[str, Any]:
    """Train the DPO adapter, or go on with it; returns counts and losses.

    Raises:
        ConfigError: optimiser or trainer fields are wrong, the GPU is too small, or the checkpoints
            are of processes that cannot be gone on from with these.
        DataError: there is no preference pair, no SFT adapter, or no reference.
        AdapterMismatchError: the SFT adapter does not fit the base.
        TryAgainError: it was asked to stop, and has saved.
        MedtrainError: policy and reference differ at the start, the loss is no number, or nothing
            was learnt.
    """
    chat = load_chat_tokenizer(run)
    rows = dpo_rows(run, config, chat)
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
        settings = dpo_settings(
            run, config, plan, validated=rows.validation is not None, console=console
        )
        trainer = PreferenceTrainer(
            model=model,
            plan=plan,
            args=settings,
            train_dataset=rows.train.dataset,
            eval_dataset=rows.validation.dataset if rows.validation else None,
            processing_class=chat.tokenizer,
        )
        collate = pair_collate(chat.pad_token_id, packed=packed)
        reference = read_reference(run, config)
        fed = feed_preferences(
            rows, config.dpo, plan, reference, seed=config.seed, collate=collate, packed=packed
        )
        fit.feed(trainer, fed)
        trainer.check_start()
        before = read_weights(run.adapter("sft"))
        return {**rows.counts.to_json(), **fit.train(trainer, before=before)}
