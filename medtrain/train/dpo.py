"""The stage `dpo`: the SFT adapter learns to prefer the better answers.

`dpo.method` → how: direct preference optimisation (here), or one of the modules beside this one →
medtrain.train.training_stage, which is the same for all. DPO: pairs and the reference's log
probabilities of them → checked: before a step, policy and reference agree → TRL's DPOTrainer, with
the loss that `dpo.loss_type` names.
"""

from __future__ import annotations

from typing import Any

from medtrain.config import RunConfig
from medtrain.console import Console
from medtrain.run import Run
from medtrain.train.evaluating import Fed
from medtrain.train.feeding import feed_preferences, pair_collate
from medtrain.train.kto import kto
from medtrain.train.orpo import orpo
from medtrain.train.reference import read_reference
from medtrain.train.rejection import rejection
from medtrain.train.rows import dpo_rows
from medtrain.train.trainer_settings import PAIRED
from medtrain.train.trainers import PreferenceTrainer
from medtrain.train.training_stage import Method, Prepared, train


def train_dpo(run: Run, config: RunConfig, console: Console) -> dict[str, Any]:
    """Train the DPO adapter by `dpo.method`, or go on with it; returns counts and losses.

    Raises:
        MedtrainError: as medtrain.train.training_stage.train does.
    """
    methods = {"dpo": dpo, "orpo": orpo, "kto": kto, "rejection": rejection}
    return train(methods[config.dpo.method](), run, config, "dpo", console)


def dpo() -> Method:
    """Direct preference optimisation (https://arxiv.org/abs/2305.18290), with any of its losses."""
    return Method(dpo_rows, PAIRED, PreferenceTrainer, _feed, checked=True)


def _feed(stage: Prepared) -> Fed:
    return feed_preferences(
        stage.rows,
        stage.section,
        stage.plan,
        read_reference(stage.run, stage.config),
        seed=stage.config.seed,
        collate=pair_collate(stage.chat.pad_token_id, packed=stage.packed),
        packed=stage.packed,
    )
