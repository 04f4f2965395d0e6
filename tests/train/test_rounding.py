"""Policy and reference are one model before a step: what rounding makes of that, and what not."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from medtrain.attention.packed import attention_for
from medtrain.errors import MedtrainError
from medtrain.train import dpo, log_probs
from medtrain.train.log_probs import AnswerScorer, Row
from medtrain.train.losses.preference import FORMULAS, Pairs, Settings
from medtrain.train.packed import PackedForward, pack
from medtrain.train.reference import read_reference
from medtrain.train.rounding import FAR, first_loss, rounding_of_sums
from tests.train.conftest import MakeRun, Ready
from tests.train.training import train

_LAYERS, _WORDS = 3, 512
_STARTS = {
    "sigmoid": math.log(2), "sigmoid_norm": math.log(2), "robust": math.log(2), "hinge": 1.0,
    "ipo": 25.0, "nca_pair": 2 * math.log(2), "bco_pair": 2 * math.log(2), "sppo_hard": 50.0,
    "apo_zero": 1.0, "apo_down": 1.0, "discopop": 0.5 * math.log(2) + 0.5,
}  # fmt: skip
"""With beta 0.1, where policy and reference agree."""


@pytest.fixture(scope="module")
def scorer() -> AnswerScorer:
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=_WORDS, hidden_size=64, intermediate_size=128, num_hidden_layers=_LAYERS,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(shape).eval()
    model.set_attn_implementation(attention_for("auto", packed=True))
    return AnswerScorer(model, torch.bfloat16, packed=True)


@pytest.fixture(scope="module")
def answers() -> list[Row]:
    drawn = random.Random(0)

    def words(count: int) -> list[int]:
        return [drawn.randrange(_WORDS) for _ in range(count)]

    return [
        Row.answering(words(drawn.randint(2, 20)), words(drawn.randint(1, 90))) for _ in range(12)
    ]


def sums_by_limit(
    scorer: AnswerScorer, answers: list[Row], monkeypatch: pytest.MonkeyPatch
) -> list[torch.Tensor]:
    found = []
    for tokens in (1, 150, 400, 10_000):
        monkeypatch.setattr(log_probs, "TOKENS_A_PASS", tokens)
        found.append(torch.tensor(scorer.sums(answers)))
    return found


def bounds(sums: torch.Tensor, answers: list[Row]) -> torch.Tensor:
    tokens = torch.tensor([sum(row.scored) for row in answers])
    return rounding_of_sums(sums, tokens, _LAYERS, torch.bfloat16)


def test_sums_in_16_bits_stay_within_the_bound_however_rows_are_packed(
    scorer: AnswerScorer, answers: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = torch.stack(sums_by_limit(scorer, answers, monkeypatch))
    assert bool((found.amax(dim=0) - found.amin(dim=0) <= bounds(found[0], answers)).all())


def test_they_do_where_every_product_is_added_up_in_another_order(
    scorer: AnswerScorer, answers: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on GPUs, whose kernels depend on the shape: half a unit of the last place at random."""
    drawn = torch.Generator().manual_seed(1)

    def disturbed(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        weight, inputs = module.weight.bfloat16().float(), args[0].bfloat16().float()
        exact = torch.nn.functional.linear(inputs, weight)
        noise = torch.randn(exact.shape, generator=drawn) * 2**-9
        return (exact * (1 + noise)).bfloat16()

    before = torch.tensor(scorer.sums(answers))
    hooks = [
        module.register_forward_hook(disturbed)
        for name, module in scorer._model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    found = torch.stack(sums_by_limit(scorer, answers, monkeypatch))
    for hook in hooks:
        hook.remove()
    gaps = (found - before).abs()
    assert bool(gaps.any()), "it was disturbed"
    assert bool((gaps <= bounds(before, answers)).all())


def test_log_probabilities_of_tokens_are_kept_in_float32(
    scorer: AnswerScorer, answers: list[Row]
) -> None:
    tokens, present, labels = log_probs._padded(answers)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        outputs = PackedForward(scorer._model)(input_ids=tokens, packed=pack(present, labels))
    assert outputs.log_probs.dtype == torch.float32


@pytest.mark.parametrize("loss_type", sorted(FORMULAS))
def test_every_loss_has_its_value_where_nothing_was_learnt(loss_type: str) -> None:
    settings = Settings(0.1, 0.2 if loss_type == "robust" else 0.0)
    tokens = torch.tensor([20, 30])

    def losses(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        return FORMULAS[loss_type](Pairs(chosen, rejected, tokens, tokens), settings)

    allowed = torch.full((2, 2), 0.05)
    begun = first_loss(losses, torch.zeros(2, 2), allowed)
    assert begun.expected == pytest.approx(_STARTS[loss_type])
    assert begun.is_explained
    assert 0 < begun.allowed < 1.5
    within = first_loss(losses, torch.tensor([[0.05, -0.05], [0.02, 0.0]]), allowed)
    assert within.is_explained
    nothing = torch.full((2, 2), math.nan)
    assert not first_loss(losses, nothing, allowed).is_explained


@pytest.mark.parametrize(("times", "warned"), [(0.5, False), (2.0, True)])
def test_a_reference_that_is_just_beyond_is_warned_of(
    make_dpo_run: MakeRun, monkeypatch: pytest.MonkeyPatch, times: float, warned: bool
) -> None:
    ready = shifted(make_dpo_run(), monkeypatch, times)
    train(ready, "dpo")
    log = ready.run.log.read_text()
    assert ("dpo_start" in log) == warned
    if warned:
        assert "the first loss is 0.69" in log


def test_one_that_is_far_beyond_is_another_model(
    make_dpo_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = shifted(make_dpo_run(), monkeypatch, 1.5 * FAR)
    with pytest.raises(MedtrainError, match=r"would start with a margin.*rounding explains"):
        train(ready, "dpo")


def shifted(ready: Ready, monkeypatch: pytest.MonkeyPatch, times: float) -> Ready:
    """Move the reference by so many times what float32 explains."""

    def reference(*args: Any) -> dict[str, tuple[float, float]]:
        return {
            key: (chosen * (1 + times * 1e-5), rejected)
            for key, (chosen, rejected) in read_reference(*args).items()
        }

    monkeypatch.setattr(dpo, "read_reference", reference)
    return ready
