"""KTO: each answer by itself is to be given, or not to be given.

pairs and the reference's sums → every answer an example, desirable if it was chosen → how far the
model has moved from the reference on mismatched pairs (medtrain.train.mismatch), in the whole step
→ TRL's KTOTrainer (Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306, section 4).

The authors, and TRL, estimate that divergence from the rows of a forward pass. Here it is the mean
over all rows of an optimiser step, in all processes: the same estimate with less noise, and one
that does not depend on how rows are dealt to forward passes. It is computed without gradients, so
a step costs a forward pass more. `dpo.batch_size` counts pairs, that is two examples.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from trl import KTOTrainer

from medtrain.config import RunConfig
from medtrain.data.examples import read_preferences
from medtrain.run import Run
from medtrain.train.evaluating import EvaluationStoppedError, Fed
from medtrain.train.feeding import feed_preferences, with_sums
from medtrain.train.loader import Forward, StepBatch, unpaired_batch
from medtrain.train.losses.computed import Computed
from medtrain.train.losses.unpaired import Weights, unpaired
from medtrain.train.mismatch import Answered, mismatched, mismatched_id
from medtrain.train.packed import PackedForward
from medtrain.train.reference import read_reference
from medtrain.train.rows import (
    IGNORED,
    PAIR_COLUMNS,
    Counts,
    Part,
    Rows,
    encode_preferences,
    refuse_no_pairs,
    split_rows,
)
from medtrain.train.trainer_settings import UNPAIRED
from medtrain.train.trainers import AnswerTrainer, answers_scored, computed_by_trl
from medtrain.train.training_stage import Method, Prepared

if TYPE_CHECKING:
    from medtrain.data.chat import ChatTokenizer

_OTHERS = ("other_chosen_ids", "other_rejected_ids")
_OTHERS_SUMS = ("ref_other_chosen_logps", "ref_other_rejected_logps")


def kto() -> Method:
    """The method."""
    return Method(kto_rows, UNPAIRED, UnpairedTrainer, _feed, checked=True)


def kto_rows(run: Run, config: RunConfig, chat: ChatTokenizer) -> Rows:
    """`prompt_ids`, the answers to it, and two answers to another prompt.

    Raises:
        DataError: there is no pair to train on, or all have one prompt.
    """
    counts = Counts()
    encoded = list(encode_preferences(read_preferences(run.preferences), config, chat, counts))
    others = mismatched([Answered(*row.columns) for row in encoded], config.dpo.max_length)
    rows = split_rows(
        (
            row._replace(columns=(*row.columns, other.chosen_ids, other.rejected_ids))
            for row, other in zip(encoded, others, strict=True)
        ),
        (*PAIR_COLUMNS, *_OTHERS),
        config.dpo.validation_fraction,
        counts,
    )
    refuse_no_pairs(run, counts)
    return rows


def _feed(stage: Prepared) -> Fed:
    reference = read_reference(stage.run, stage.config)
    fed = feed_preferences(
        stage.rows,
        stage.section,
        stage.plan,
        reference,
        seed=stage.config.seed,
        collate=unpaired_batch(stage.chat.pad_token_id, packed=stage.packed),
        packed=stage.packed,
    )

    def with_others(dataset: Any, part: Part) -> Any:
        ids = [mismatched_id(row) for row in part.ids]
        return with_sums(dataset, ids, reference, _OTHERS_SUMS)

    validation = stage.rows.validation
    return fed._replace(
        dataset=with_others(fed.dataset, stage.rows.train),
        validation=with_others(fed.validation, validation) if validation else None,
    )


class UnpairedTrainer(AnswerTrainer, KTOTrainer):  # type: ignore[misc]
    """TRL's KTOTrainer, told the divergence of a whole step."""

    _divergence: torch.Tensor
    """(1,) nats; negative where the estimate is."""

    def training_step(
        self, model: Any, batch: StepBatch, num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """A step of the loop, once it is known how far the model has moved so far."""
        counted = ((forward, float(len(forward.rows))) for forward in batch.forwards)
        self._divergence = self._estimate(model, counted)
        loss: torch.Tensor = super().training_step(model, batch, num_items_in_batch)
        return loss

    def evaluation_loop(
        self, dataloader: Iterable[tuple[Forward, float]], *args: Any, **kwargs: Any
    ) -> Any:
        """As for all, with the divergence on all validation rows.

        Raises:
            EvaluationStoppedError: training is to stop; in all processes.
        """
        forwards = list(dataloader)
        self.model_wrapped.eval()
        self._divergence = self._estimate(self.model_wrapped, forwards, evaluating=True)
        return super().evaluation_loop(forwards, *args, **kwargs)

    @torch.no_grad()
    def _estimate(
        self, model: Any, counted: Iterable[tuple[Forward, float]], *, evaluating: bool = False
    ) -> torch.Tensor:
        """Mean of log π(y'|x) - log π_ref(y'|x) over mismatched pairs of all processes, (1,)."""
        device = self.args.device
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        for forward, weight in counted:
            if evaluating and self.stop.agreed(device):
                raise EvaluationStoppedError
            inputs = self._prepare_inputs(forward.inputs["mismatched"])
            answer, known = inputs.pop("completion_mask"), inputs.pop("ref_logps")
            outputs = PackedForward(model)(
                **inputs,
                labels=inputs["input_ids"].masked_fill(answer == 0, IGNORED),
                use_cache=False,
                fused_lm_head=True,
            )
            moved = (outputs.log_probs.float().sum(dim=1) - known).mean()
            sums += torch.stack([moved, torch.ones_like(moved)]).double() * weight
        total = self.accelerator.reduce(sums, reduction="sum")
        mean: torch.Tensor = total[:1] / total[1:]
        return mean.float()

    def computed(self, model: Any, inputs: Any, items: torch.Tensor | None) -> Computed:
        """KTO's loss, or what TRL makes of settings that ask for more."""
        if self.loss_type != "kto" or self.aux_loss_enabled:
            return computed_by_trl(self, KTOTrainer, model, inputs, items)
        weights = Weights(self.beta, self.desirable_weight, self.undesirable_weight)
        return unpaired(answers_scored(model, inputs), inputs, self._divergence, weights)

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        # TRL subtracts the reference's sums of the mismatched pairs; that has been done.
        known = {"ref_KL_logps": torch.zeros_like(self._divergence)}
        answers = {key: value for key, value in inputs.items() if key != "mismatched"}
        return super()._compute_loss(model, {**answers, **known}, return_outputs)

    def _compute_kl_logps(self, model: Any, batch: Any) -> torch.Tensor:
        return self._divergence

    def _reference(self, inputs: Any) -> torch.Tensor:
        sums: torch.Tensor = inputs["ref_logps"]
        return sums
