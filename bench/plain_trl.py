"""The baseline of bench/train.py and bench/gpu.py: plain TRL, every row padded to one length.

token ids in the order in which medtrain takes them → TRL's SFTTrainer or DPOTrainer with medtrain's
settings (optimiser, schedule, clipping, dtype), but batches of `batch_size` rows padded to
`max_length`, several of them accumulated to a step, and DPO's reference computed in every step by a
copy of the adapter that training starts from. The adapter keeps its float32 as medtrain's does, in
place of TRL's cast to bfloat16, so that both sides learn the same.
"""

from __future__ import annotations

from typing import Any

from transformers import PrinterCallback
from trl import DPOTrainer, SFTTrainer
from turns import Side, StepClock

from medtrain.config import RunConfig
from medtrain.console import Console
from medtrain.run import Run, Trained
from medtrain.train.batches import BatchPlan
from medtrain.train.checkpoints import Plan
from medtrain.train.rows import Part
from medtrain.train.trainer_settings import PAIRED, SUPERVISED, trainer_settings
from medtrain.train.trainers import weights_kept


class PairTrainer(DPOTrainer):  # type: ignore[misc]
    """TRL's, for pairs that are token ids already."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset


def order_and_tokens(part: Part, section: Any, plan: Plan, seed: int) -> tuple[list[int], int]:
    """The rows as medtrain takes them, and the tokens of all steps but the first."""
    steps = BatchPlan(part.lengths, plan.rows_a_step, 1, section.batch_size, None, seed)
    order = steps.order(0)
    return order, sum(part.lengths[row] for row in order[plan.rows_a_step :])


def train_plainly(
    stage: Trained, model: Any, part: Part, tokenizer: Any, run: Run, config: RunConfig, plan: Plan
) -> Side:
    """Train a PeftModel by TRL alone, and say what it took.

    Args:
        stage: sft or dpo.
        model: with its adapter; in DPO the one that the reference is, too.
        part: rows of token ids.
        tokenizer: knows the padding token.
        run: names a directory for checkpoints, of which there are none.
        config: the stage's settings.
        plan: of steps.
    """
    section = getattr(config, stage)
    order, tokens = order_and_tokens(part, section, plan, config.seed)
    plainly = section.model_copy(update={"trainer": {
        **section.trainer,
        "gradient_accumulation_steps": section.gradient_accumulation,
        "pad_to_multiple_of": section.max_length,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
    }})  # fmt: skip
    config = config.model_copy(update={stage: plainly})
    fields = SUPERVISED if stage == "sft" else PAIRED
    settings = trainer_settings(
        fields, run, config, stage, plan, validated=False, console=Console(quiet=True)
    )
    make_trainer = SFTTrainer if stage == "sft" else PairTrainer
    with weights_kept(model):
        trainer = make_trainer(
            model=model,
            args=settings,
            train_dataset=part.dataset.select(order),
            processing_class=tokenizer,
        )
    trainer.remove_callback(PrinterCallback)
    clock = StepClock()
    trainer.add_callback(clock)
    trainer.train()
    return Side(tokens, clock.spent, clock.loss, float(section.gradient_accumulation))
