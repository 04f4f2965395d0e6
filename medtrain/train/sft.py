"""Supervised fine-tuning: a LoRA adapter learns to give the reference answers.

training rows → token ids with labels on the answers → a fresh adapter, with the rows of new tokens
→ TRL's SFTTrainer → sft/adapter and logs/sft.metrics.jsonl (medtrain.train.training_stage).
"""

from __future__ import annotations

from typing import Any

from medtrain.config import RunConfig
from medtrain.console import Console
from medtrain.run import Run
from medtrain.train.evaluating import Fed
from medtrain.train.feeding import feed_supervised
from medtrain.train.rows import sft_rows
from medtrain.train.trainer_settings import SUPERVISED
from medtrain.train.trainers import SupervisedTrainer
from medtrain.train.training_stage import Method, Prepared, train


def train_sft(run: Run, config: RunConfig, console: Console) -> dict[str, Any]:
    """Train the SFT adapter, or go on with it; returns counts and losses.

    Raises:
        MedtrainError: as medtrain.train.training_stage.train does.
    """
    method = Method(sft_rows, SUPERVISED, SupervisedTrainer, feed_rows)
    return train(method, run, config, "sft", console)


def feed_rows(stage: Prepared) -> Fed:
    """Rows with labels on their answers, as SFTTrainer takes them."""
    return feed_supervised(
        stage.rows,
        stage.section,
        stage.plan,
        seed=stage.config.seed,
        pad_token_id=stage.chat.pad_token_id,
        packed=stage.packed,
    )
