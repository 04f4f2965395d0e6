"""Our losses and figures are TRL's, and nothing of them is read before a line is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from trl import DPOTrainer, KTOTrainer, SFTTrainer

from medtrain.train.dpo import train_dpo
from medtrain.train.figures import Figures
from medtrain.train.fit import Fit
from medtrain.train.losses.computed import Computed, Ratio
from medtrain.train.losses.preference import FORMULAS
from medtrain.train.packed import PackedForward
from medtrain.train.reference import compute_reference
from medtrain.train.sft import train_sft
from tests.train.conftest import MakeRun, Ready
from tests.train.waits import waits_counted

MakeTrainer = Callable[..., Any]
_TRL = {"sft": SFTTrainer, "dpo": DPOTrainer, "kto": KTOTrainer}


@pytest.fixture
def trainer_of(make_dpo_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> MakeTrainer:
    """Make a trainer as its stage does, up to its first step."""

    def make(stage: str, **section: Any) -> Any:
        made: list[Any] = []
        with monkeypatch.context() as patched:
            patched.setattr(Fit, "train", lambda fit, trainer, before: made.append(trainer) or {})
            ready: Ready = make_dpo_run(**{stage: section})
            if section.get("method") == "kto":
                compute_reference(*ready)
            (train_sft if stage == "sft" else train_dpo)(*ready)
        return made[0]

    return make


def passed(trainer: Any, rows: int = 4) -> dict[str, Any]:
    inputs = trainer.fed.collate([trainer.fed.dataset[row] for row in range(rows)])
    return dict(trainer._prepare_inputs(inputs))


def both(trainer: Any, kind: Any, items: torch.Tensor | None) -> tuple[Computed, torch.Tensor, Any]:
    """What we and TRL make of one pass in training mode, with gradients: ours, its loss, figures"""
    trainer.model.train()
    model, inputs = PackedForward(trainer.model), passed(trainer)
    ours = trainer.computed(model, dict(inputs), items)
    theirs = kind.compute_loss(trainer, model, dict(inputs), num_items_in_batch=items)
    noted = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return ours, theirs, noted


def agree(trainer: Any, kind: Any, items: torch.Tensor | None) -> None:
    ours, theirs, noted = both(trainer, kind, items)
    assert torch.equal(ours.loss, theirs), "the very same number"
    assert int(ours.tokens) == noted.pop("num_tokens")
    figures = Figures(torch.device("cpu"))
    figures.add(ours)
    means, tokens = figures.line()
    assert tokens == int(ours.tokens)
    assert means == {name: pytest.approx(value, rel=1e-5, abs=1e-6)
                     for name, value in noted.items()}  # fmt: skip
    gradients = []
    for loss in (ours.loss, theirs):
        trainer.model.zero_grad()
        loss.backward()
        gradients.append([p.grad.clone() for p in trainer.model.parameters() if p.grad is not None])
    assert gradients[0]
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.parametrize("packing", [True, False])
def test_fine_tuning(trainer_of: MakeTrainer, packing: bool) -> None:
    trainer = trainer_of("sft", packing=packing, lora={"r": 4, "dropout": 0.0})
    for items in (torch.tensor(123), None):
        trainer._metrics["train"].clear()
        trainer._total_train_tokens = 0
        agree(trainer, SFTTrainer, items)


@pytest.mark.parametrize("loss_type", sorted(FORMULAS))
def test_every_loss_of_pairs(trainer_of: MakeTrainer, loss_type: str) -> None:
    smoothed = {"label_smoothing": 0.2} if loss_type == "robust" else {}
    trainer = trainer_of("dpo", loss_type=loss_type, **smoothed)
    moved(trainer)
    agree(trainer, DPOTrainer, None)


def test_answers_by_themselves(trainer_of: MakeTrainer) -> None:
    trainer = trainer_of("dpo", method="kto", desirable_weight=1.5, undesirable_weight=0.5)
    moved(trainer)
    for divergence in (0.7, -0.3):
        trainer._metrics["train"].clear()
        trainer._total_train_tokens = 0
        trainer._divergence = torch.tensor([divergence])
        agree(trainer, KTOTrainer, None)


def moved(trainer: Any) -> None:
    """Away from its reference, and without dropout, whose draws differ from call to call."""
    torch.manual_seed(0)
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.02)
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


@pytest.mark.parametrize(
    ("stage", "section"),
    [
        ("sft", {"trainer": {"loss_type": "dft"}, "lora": {"r": 4, "dropout": 0.0}}),
        ("dpo", {"trainer": {"f_divergence_type": "js_divergence"}}),
        ("dpo", {"trainer": {"use_weighting": True}}),
    ],
)
def test_settings_beyond_ours_are_left_to_trl(
    trainer_of: MakeTrainer, stage: str, section: dict[str, Any]
) -> None:
    trainer = trainer_of(stage, **section)
    moved(trainer)
    model, inputs = PackedForward(trainer.model), passed(trainer)
    trainer.model.train()
    ours = trainer.computed(model, dict(inputs), None)
    theirs = _TRL[stage].compute_loss(trainer, model, dict(inputs))
    noted = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert torch.equal(ours.loss, theirs)
    assert ours.tokens == noted.pop("num_tokens")
    assert {name: ratio.total for name, ratio in ours.figures.items()} == noted


# Figures


def test_a_line_is_of_all_tokens_whatever_pass_they_were_in() -> None:
    figures = Figures(torch.device("cpu"))
    for total, of, tokens in ((3.0, 10, 12), (0.0, 30, 40)):
        computed = Computed(torch.tensor(0.0), {"accuracy": Ratio(torch.tensor(total), of)}, tokens)
        figures.add(computed)
    assert figures.line() == ({"accuracy": 3 / 40}, 52)
    other = Figures(torch.device("cpu"))
    other.restore(figures.sums())
    assert other.line() == figures.line()
    figures.clear()
    assert figures.line() == ({}, 0)


def test_a_step_that_turns_out_bad_is_no_part_of_a_line() -> None:
    figures = Figures(torch.device("cpu"))
    for good in (True, False, True):
        number = torch.tensor(1.0 if good else float("nan"))
        figures.add_to_step(Computed(number, {"entropy": Ratio(number, 1)}, 5))
        figures.end_step(torch.tensor(good))
    assert figures.line() == ({"entropy": 1.0}, 10)


# Waits


@contextmanager
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What TRL asks about devices is answered as if there were one with Triton."""
    with monkeypatch.context() as patched:
        patched.setattr("trl.trainer.utils._use_triton", lambda device: True)
        yield


@pytest.mark.parametrize(
    ("stage", "section"),
    [("sft", {}), *(("dpo", {"method": each}) for each in ("dpo", "orpo", "kto"))],
)
def test_a_pass_reads_nothing(
    trainer_of: MakeTrainer, monkeypatch: pytest.MonkeyPatch, stage: str, section: dict[str, Any]
) -> None:
    """Whatever would make the host wait for a GPU, forward and backward."""
    trainer = trainer_of(stage, **section)
    trainer.model.train()
    trainer._divergence = torch.zeros(1)
    inputs = passed(trainer)
    figures, items, good = trainer.figures["train"], torch.tensor(99), torch.tensor(True)
    with on_a_gpu(monkeypatch), waits_counted() as waits:
        computed = trainer.computed(PackedForward(trainer.model), inputs, items)
        computed.loss.backward()
        figures.add_to_step(computed)
        figures.end_step(good)
    assert not waits, waits
    with waits_counted() as waits:
        figures.line()
    assert waits, "a line is what they are read for"
