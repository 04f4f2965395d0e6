"""Every way to learn from preferences: its published loss, what it learns, and its resumption."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid, relu, sigmoid

from medtrain.config import DPOConfig, parse_config
from medtrain.data.examples import Preference
from medtrain.errors import ConfigError, DataError
from medtrain.files import read_jsonl, write_jsonl
from medtrain.run import Trained
from medtrain.train.adapter import attach_adapter
from medtrain.train.dpo import train_dpo
from medtrain.train.fit import Fit
from medtrain.train.kto import kto_rows
from medtrain.train.loader import Forward, Inputs
from medtrain.train.log_probs import AnswerScorer, Row
from medtrain.train.mismatch import Answered, is_mismatched, mismatched, partners
from medtrain.train.model import load_base
from medtrain.train.orpo import odds_ratio_losses
from medtrain.train.packed import PackedForward
from medtrain.train.reference import compute_reference
from medtrain.train.rejection import best_of, rejection_rows
from medtrain.train.rows import IGNORED
from tests.train.conftest import MakeRun, Ready
from tests.train.training import losses, same_training, stopped_at, stopped_evaluating

_ROOT = Path(__file__).resolve().parents[2]
METHODS = ("dpo", "orpo", "kto", "rejection")
BETA = 0.1
FLIPPED = 0.2


@pytest.fixture
def ready_for(make_dpo_run: MakeRun) -> Callable[..., Ready]:
    """Make a run that a method can be trained on: SFT and, where it has one, the reference done."""

    def make(method: str, name: str = "run", **dpo: Any) -> Ready:
        ready = make_dpo_run(name, dpo={"method": method, **dpo})
        if method == "kto":  # it compares more than the others
            compute_reference(*ready)
        return ready

    return make


@pytest.fixture
def trainer_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[Ready], Any]:
    """Make the trainer of a run as the stage does, up to its first step."""

    def make(ready: Ready) -> Any:
        made: list[Any] = []

        def keep(fit: Fit, trainer: Any, before: Any) -> dict[str, Any]:
            made.append(trainer)
            return {}

        with monkeypatch.context() as patched:
            patched.setattr(Fit, "train", keep)
            train_dpo(*ready)
        return made[0]

    return make


def inputs_of(trainer: Any, count: int = 4) -> Inputs:
    """A forward pass of the first rows."""
    inputs: Inputs = trainer.fed.collate([trainer.fed.dataset[row] for row in range(count)])
    return inputs


def loss_of(trainer: Any, inputs: Inputs) -> float:
    with torch.no_grad():
        return float(trainer.computed(PackedForward(trainer.model), inputs, None).loss)


def plain(trainer: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Log probabilities of an answer's tokens, from the logits of its row alone."""
    with torch.no_grad():
        logits = trainer.model(torch.tensor([[*prompt, *answer]])).logits[0].double()
    scored = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return scored.gather(1, torch.tensor(answer)[:, None]).squeeze(1)


class Batch(NamedTuple):
    """What the formulas of the papers are about, a number a pair."""

    chosen: torch.Tensor
    """log π(chosen) - log π_ref(chosen)."""
    rejected: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor

    @property
    def margin(self) -> torch.Tensor:
        return self.chosen - self.rejected

    @property
    def mean_margin(self) -> torch.Tensor:
        return self.chosen / self.chosen_tokens - self.rejected / self.rejected_tokens


def discopop(batch: Batch) -> torch.Tensor:
    logits = BETA * batch.margin
    share = sigmoid(logits / 0.05)
    return -logsigmoid(logits) * (1 - share) + torch.exp(-logits) * share


FORMULAS: dict[str, Callable[[Batch], torch.Tensor]] = {
    "sigmoid": lambda b: -logsigmoid(BETA * b.margin),
    "hinge": lambda b: relu(1 - BETA * b.margin),
    "ipo": lambda b: (b.mean_margin - 1 / (2 * BETA)) ** 2,
    "robust": lambda b: (
        ((1 - FLIPPED) * -logsigmoid(BETA * b.margin) + FLIPPED * logsigmoid(-BETA * b.margin))
        / (1 - 2 * FLIPPED)
    ),
    "nca_pair": lambda b: (
        -logsigmoid(BETA * b.chosen)
        - 0.5 * logsigmoid(-BETA * b.chosen)
        - 0.5 * logsigmoid(-BETA * b.rejected)
    ),
    "bco_pair": lambda b: -logsigmoid(BETA * b.chosen) - logsigmoid(-BETA * b.rejected),
    "sppo_hard": lambda b: (b.chosen - 0.5 / BETA) ** 2 + (b.rejected + 0.5 / BETA) ** 2,
    "apo_zero": lambda b: 1 - sigmoid(BETA * b.chosen) + sigmoid(BETA * b.rejected),
    "apo_down": lambda b: sigmoid(BETA * b.chosen) + 1 - sigmoid(BETA * b.margin),
    "discopop": discopop,
    "sigmoid_norm": lambda b: -logsigmoid(BETA * b.mean_margin),
}


def test_every_loss_of_dpo_is_as_published_and_packing_does_not_show(
    ready_for: Callable[..., Ready], trainer_of: Callable[[Ready], Any]
) -> None:
    assert set(FORMULAS) == set(get_args(DPOConfig.model_fields["loss_type"].annotation))
    trainer = trainer_of(ready_for("dpo"))
    inputs, rows = inputs_of(trainer), [trainer.fed.dataset[row] for row in range(4)]
    # As after some steps: other answers have become likelier, others less likely.
    inputs["ref_chosen_logps"] += torch.tensor([-2.0, 1.0, 4.0, -8.0])
    inputs["ref_rejected_logps"] += torch.tensor([3.0, -1.0, -6.0, 2.0])
    moved = {
        side: torch.stack([plain(trainer, r["prompt_ids"], r[f"{side}_ids"]).sum() for r in rows])
        - inputs[f"ref_{side}_logps"].double()
        for side in ("chosen", "rejected")
    }
    tokens = [
        torch.tensor([len(r[side]) for r in rows], dtype=torch.float64)
        for side in ("chosen_ids", "rejected_ids")
    ]
    batch = Batch(moved["chosen"], moved["rejected"], *tokens)
    padded = {key: value for key, value in inputs.items() if key != "packed"}
    assert "packed" in inputs
    trainer.label_smoothing = FLIPPED
    for name, formula in FORMULAS.items():
        trainer.loss_types, trainer.loss_weights = [name], [1.0]
        packed = loss_of(trainer, inputs)
        assert packed == pytest.approx(loss_of(trainer, padded), rel=1e-5), name
        assert packed == pytest.approx(float(formula(batch).mean()), rel=1e-4), name


def test_the_loss_that_is_named_is_the_one_that_is_used(
    ready_for: Callable[..., Ready], trainer_of: Callable[[Ready], Any]
) -> None:
    ready = ready_for("dpo", loss_type="robust", label_smoothing=FLIPPED, beta=0.3)
    trainer = trainer_of(ready)
    assert (trainer.loss_types, trainer.label_smoothing) == (["robust"], FLIPPED)
    assert trainer.beta == 0.3


def test_orpo_is_fine_tuning_and_the_odds_ratio(
    ready_for: Callable[..., Ready], trainer_of: Callable[[Ready], Any]
) -> None:
    trainer = trainer_of(ready_for("orpo", beta=0.5))
    inputs, rows = inputs_of(trainer), [trainer.fed.dataset[row] for row in range(4)]
    chosen, rejected = (
        torch.stack([plain(trainer, row["prompt_ids"], row[side]).mean() for row in rows]).exp()
        for side in ("chosen_ids", "rejected_ids")
    )
    ratio = (chosen / (1 - chosen)) / (rejected / (1 - rejected))
    expected = float((-chosen.log() - 0.5 * ratio.log().sigmoid().log()).mean())
    assert loss_of(trainer, inputs) == pytest.approx(expected, rel=1e-5)
    padded = {key: value for key, value in inputs.items() if key != "packed"}
    assert loss_of(trainer, padded) == pytest.approx(expected, rel=1e-5)
    assert not any(name.startswith("ref") for name in inputs)


def test_the_odds_ratio_is_the_one_of_trl_and_finite_for_certain_answers() -> None:
    from trl.experimental.orpo import ORPOTrainer

    class Beta:
        beta, accelerator = 0.4, type("Accelerator", (), {"device": "cpu"})

    chosen, rejected = torch.tensor([-0.1, -2.0, -0.7]), torch.tensor([-3.0, -0.5, -0.69])
    ratios = ORPOTrainer.odds_ratio_loss(Beta(), chosen, rejected)[0]
    assert torch.allclose(odds_ratio_losses(chosen, rejected, 0.4), -chosen - ratios, atol=1e-6)
    certain = torch.zeros(1, requires_grad=True)
    (loss,) = odds_ratio_losses(certain, torch.tensor([-1.0]), 0.4)
    loss.backward()
    assert torch.isfinite(loss)
    assert certain.grad is not None
    assert torch.isfinite(certain.grad).all()


@pytest.mark.parametrize("shift", [3.0, -3.0], ids=["moved", "clamped"])
def test_kto_weighs_each_answer_against_the_divergence(
    ready_for: Callable[..., Ready], trainer_of: Callable[[Ready], Any], shift: float
) -> None:
    trainer = trainer_of(ready_for("kto", desirable_weight=1.5, undesirable_weight=0.5, beta=0.3))
    rows = [trainer.fed.dataset[row] for row in range(4)]
    forward, _ = next(iter(trainer.get_eval_dataloader()))
    assert float(trainer._estimate(trainer.model, [(forward, 1.0)])) == pytest.approx(0, abs=1e-4)

    inputs = inputs_of(trainer)
    inputs["ref_logps"] += torch.linspace(-4, 4, 8)
    inputs["mismatched"]["ref_logps"] -= shift
    other = [
        plain(trainer, row["prompt_ids"], row[f"other_{side}_ids"]).sum()
        for side in ("chosen", "rejected")
        for row in rows
    ]
    estimate = trainer._estimate(trainer.model, [(Forward(inputs, (0, 1, 2, 3)), 4.0)])
    expected = float((torch.stack(other) - inputs["mismatched"]["ref_logps"]).mean())
    assert float(estimate) == pytest.approx(expected, abs=1e-4)
    assert expected == pytest.approx(shift, abs=1e-3)

    trainer._divergence = estimate
    z = max(0.0, expected)
    chosen, rejected = (
        torch.stack([plain(trainer, row["prompt_ids"], row[side]).sum() for row in rows])
        for side in ("chosen_ids", "rejected_ids")
    )
    desirable = 1.5 * (1 - sigmoid(0.3 * (chosen - inputs["ref_logps"][:4] - z)))
    undesirable = 0.5 * (1 - sigmoid(0.3 * (z - (rejected - inputs["ref_logps"][4:]))))
    by_hand = float(torch.cat([desirable, undesirable]).mean())
    assert loss_of(trainer, inputs) == pytest.approx(by_hand, rel=1e-4)
    padded = {key: value for key, value in inputs.items() if key != "packed"}
    assert loss_of(trainer, padded) == pytest.approx(by_hand, rel=1e-4)


def test_kto_does_not_depend_on_how_rows_are_dealt(ready_for: Callable[..., Ready]) -> None:
    found = []
    for batch_size in (1, 4):
        ready = ready_for(
            "kto", f"of-{batch_size}", batch_size=batch_size, gradient_accumulation=4 // batch_size,
            max_steps=4, log_every=1, learning_rate=1e-2, packing=False, eval_batch_size=batch_size,
        )  # fmt: skip
        train_dpo(*ready)
        found.append(losses(ready.run, "dpo") + losses(ready.run, "dpo", "eval"))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert len(set(found[0])) > 3


_CHILD = """
import sys
from pathlib import Path
from medtrain.config import load_config
from medtrain.console import Console, quiet_libraries
from medtrain.ending import Ending
from medtrain.run import Run
ending = Ending.register()
quiet_libraries()
from medtrain.train.dpo import train_dpo
train_dpo(Run(Path(sys.argv[1])), load_config(Path(sys.argv[1])), Console(quiet=True))
ending.code = 0
"""


def test_two_processes_learn_by_kto_what_one_learns(
    ready_for: Callable[..., Ready], tmp_path: Path
) -> None:
    settings = {"max_steps": 4, "log_every": 1, "batch_size": 2, "learning_rate": 1e-2}
    one = ready_for("kto", "one", gradient_accumulation=2, **settings)
    two = ready_for("kto", "two", gradient_accumulation=1, **settings)
    train_dpo(*one)
    (tmp_path / "child.py").write_text(_CHILD)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [sys.executable, *launch, str(tmp_path / "child.py"), str(two.run.root)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for kind in ("train", "eval"):
        assert losses(two.run, "dpo", kind) == pytest.approx(losses(one.run, "dpo", kind), rel=1e-5)


# What is learnt


def preference(ready: Ready, stage: Trained) -> tuple[float, float]:
    """Mean log-probability of a token of the chosen answers, and how far the rejected are below."""
    base = load_base(ready.run, ready.config, ready.chat, quantized=True)
    scorer = AnswerScorer(
        attach_adapter(base, ready.run.adapter(stage)), torch.float32, packed=False
    )
    rows = []
    for pair in list(read_jsonl(ready.run.preferences))[:8]:
        encoded = ready.chat.encode_preference(pair["prompt"], pair["chosen"], pair["rejected"])
        rows += [Row.answering(encoded.prompt_ids, encoded.chosen_ids)]
        rows += [Row.answering(encoded.prompt_ids, encoded.rejected_ids)]
    means = torch.tensor(
        [nats / sum(row.scored) for nats, row in zip(scorer.sums(rows), rows, strict=True)]
    )
    chosen, rejected = means[::2].mean(), means[1::2].mean()
    return float(chosen), float(chosen - rejected)


@pytest.mark.parametrize("method", METHODS)
def test_chosen_answers_become_likelier_than_rejected_ones(
    ready_for: Callable[..., Ready], method: str
) -> None:
    ready = ready_for(method, learning_rate=5e-3, max_steps=8, evals_per_epoch=0)
    counts = train_dpo(*ready)
    assert counts["train_rows"] + counts["validation_rows"] == 48
    chosen_before, margin_before = preference(ready, "sft")
    chosen, margin = preference(ready, "dpo")
    assert chosen > chosen_before + 0.01
    assert margin > margin_before + 0.01
    trained = losses(ready.run, "dpo")
    assert trained[-1] < trained[0]


@pytest.mark.parametrize("method", ["orpo", "kto", "rejection"])
def test_a_stopped_training_ends_with_the_same_bytes(
    ready_for: Callable[..., Ready], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_steps": 6, "log_every": 1, "evals_per_epoch": 2, "eval_batch_size": 2}
    undisturbed = ready_for(method, "undisturbed", **settings)
    stopped = ready_for(method, "stopped", **settings)
    train_dpo(*undisturbed)
    stopped_at(stopped, "dpo", monkeypatch, 3)
    stopped_evaluating(stopped, "dpo", monkeypatch, 4)
    train_dpo(*stopped)
    same_training(undisturbed.run, stopped.run, "dpo")


@pytest.mark.parametrize("method", ["orpo", "rejection"])
def test_without_a_reference_none_is_asked_for(
    ready_for: Callable[..., Ready], method: str
) -> None:
    ready = ready_for(method, max_steps=2)
    ready.run.reference.unlink()
    assert train_dpo(*ready)["steps"] == 2


def test_kto_wants_a_reference_of_its_own(make_dpo_run: MakeRun) -> None:
    """DPO's lacks the answers to other prompts."""
    with pytest.raises(DataError, match="no log probabilities of") as caught:
        train_dpo(*make_dpo_run(dpo={"method": "kto"}))
    assert "--force reference" in caught.value.fix


# Mismatched pairs


token_ids = st.lists(st.integers(0, 3), min_size=1, max_size=3)


several = st.lists(token_ids, min_size=2, max_size=30).filter(lambda p: any(x != p[0] for x in p))


@given(several)
def test_a_partner_has_another_prompt(prompts: list[list[int]]) -> None:
    found = partners(prompts)
    assert all(prompts[row] != prompts[other] for row, other in enumerate(found))
    if 2 * max(Counter(map(tuple, prompts)).values()) <= len(prompts):
        assert sorted(found) == list(range(len(prompts)))


def test_one_prompt_has_no_partner() -> None:
    with pytest.raises(DataError, match="two prompts at least"):
        partners([[1, 2], [1, 2]])
    assert partners([]) == []


def test_mismatched_answers_fit_the_longest_row() -> None:
    long = Answered([1] * 6, [2] * 4, [3] * 3)
    short = Answered([4], [5] * 9, [6] * 8)
    assert mismatched([long, short], 10) == [
        Answered([1] * 6, [5] * 4, [6] * 4),
        Answered([4], [2] * 4, [3] * 3),
    ]


def test_kto_trains_on_the_mismatched_pairs_of_its_reference(
    ready_for: Callable[..., Ready], trainer_of: Callable[[Ready], Any]
) -> None:
    ready = ready_for("kto")
    lines = [line for line in read_jsonl(ready.run.reference) if is_mismatched(line["id"])]
    rows = kto_rows(ready.run, ready.config, ready.chat)
    assert rows.validation is not None
    assert len(lines) == len(rows.train) + len(rows.validation) == 48
    trainer = trainer_of(ready)
    for row in trainer.fed.dataset.select(range(3)):
        for side in ("chosen", "rejected"):
            found = plain(trainer, row["prompt_ids"], row[f"other_{side}_ids"]).sum()
            assert row[f"ref_other_{side}_logps"] == pytest.approx(float(found), abs=1e-3)


# Rejection sampling


def pairs_of(edges: list[tuple[str, str]]) -> list[Preference]:
    return [
        Preference(f"{number}", "table", (), chosen, rejected)
        for number, (chosen, rejected) in enumerate(edges)
    ]


answers = st.sampled_from("abcdef")
edges = st.lists(st.tuples(answers, answers).filter(lambda edge: edge[0] != edge[1]), max_size=12)


@given(edges)
def test_the_best_answer_is_beaten_by_none(graph: list[tuple[str, str]]) -> None:
    best = best_of(pairs_of(graph))
    beaten = {rejected for _, rejected in graph}
    wins = Counter(chosen for chosen, _ in graph if chosen not in beaten)
    if best is None:
        assert not wins
        return
    assert wins[best.chosen] == max(wins.values())
    winners = [chosen for chosen, _ in graph if wins[chosen] == max(wins.values())]
    assert best.chosen == winners[0]
    assert best.id == str([chosen for chosen, _ in graph].index(best.chosen))


def test_rejection_trains_once_on_each_prompt(ready_for: Callable[..., Ready]) -> None:
    ready = ready_for("rejection", validation_fraction=0)
    pairs = list(read_jsonl(ready.run.preferences))[:4]
    asked = [pair["prompt"] for pair in pairs]

    def pair(number: int, prompt: int, chosen: str, rejected: str, **cut: bool) -> dict[str, Any]:
        return {"id": f"p{number}", "source": "table", "prompt": asked[prompt], "chosen": chosen,
                "rejected": rejected, **cut}  # fmt: skip

    write_jsonl(ready.run.preferences, [
        pair(0, 0, "better", "bad"), pair(1, 0, "best", "better"), pair(2, 0, "best", "bad"),
        pair(3, 1, "rock", "scissors"), pair(4, 1, "scissors", "paper"),
        pair(5, 1, "paper", "rock"),
        pair(6, 2, "it goes on", "no", chosen_cut=True),
        pair(7, 3, "whole", "cut", rejected_cut=True),
    ])  # fmt: skip
    rows = rejection_rows(ready.run, ready.config, ready.chat)
    assert rows.train.ids == ("p1", "p6", "p7")
    assert (rows.counts.train_rows, rows.counts.unusable_rows) == (3, 1)
    end, learnt = ready.chat.end_token_id, []
    for row, prompt in zip(rows.train.dataset, (0, 2, 3), strict=True):
        before = ready.chat.encode_preference(asked[prompt], "x", "y").prompt_ids
        assert row["input_ids"][: len(before)] == before
        assert row["labels"][: len(before)] == [IGNORED] * len(before)
        assert row["labels"][len(before) :] == row["input_ids"][len(before) :]
        learnt.append([label for label in row["labels"] if label != IGNORED])
    assert [ids[-1] == end for ids in learnt] == [True, False, True]
    said = [ready.chat.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in learnt]
    assert said == ["best", "it goes on", "whole"]
    assert rows.train.items == tuple(map(len, learnt))


def test_rejection_without_a_best_answer_says_so(ready_for: Callable[..., Ready]) -> None:
    ready = ready_for("rejection")
    write_jsonl(ready.run.preferences, [])
    with pytest.raises(DataError, match="no preference pair"):
        train_dpo(*ready)


# Settings


@pytest.mark.parametrize(
    ("dpo", "said"),
    [
        ({"method": "kto", "loss_type": "ipo"}, "loss_type is used by method: dpo only"),
        ({"method": "orpo", "loss_type": "hinge"}, "and method is orpo; leave it out"),
        (
            {"method": "kto", "loss_type": "ipo", "label_smoothing": 0.1},
            "label_smoothing is used by method: dpo only, and method is kto; loss_type is used",
        ),
        ({"method": "rejection", "beta": 0.2}, "beta is used by method: dpo or orpo or kto only"),
        ({"method": "kto", "label_smoothing": 0.1}, "label_smoothing is used by method: dpo"),
        ({"label_smoothing": 0.1}, "label_smoothing is used by loss_type: robust only"),
        ({"desirable_weight": 2.0}, "desirable_weight is used by method: kto only"),
        ({"method": "kto", "undesirable_weight": 0}, "greater than 0"),
        ({"method": "orpo", "trainer": {"f_divergence_type": "forward_kl"}}, "share no such field"),
        ({"method": "kto", "trainer": {"use_weighting": True}}, "KTOConfig has no such field"),
        (
            {"method": "rejection", "trainer": {"use_weighting": True}},
            "SFTConfig has no such field",
        ),
    ],
)
def test_settings_without_an_effect_are_refused(dpo: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(dpo)
    assert said in str(caught.value)


def config_of(dpo: dict[str, Any]) -> Any:
    source = {"adapter": "table", "path": "rows.jsonl"}
    return parse_config(
        {"name": "run", "model": {"base": "b"}, "data": {"sources": [source]}, "dpo": dpo}
    )


def test_settings_with_an_effect_are_not() -> None:
    for method in METHODS:
        dumped = config_of({"method": method}).dpo.model_dump(mode="json")
        assert config_of(dumped).dpo.method == method
    config_of({"method": "kto", "desirable_weight": 1.3, "beta": 0.2})
    config_of({"method": "orpo", "beta": 0.2, "trainer": {"adam_beta2": 0.95}})
    config_of({"loss_type": "robust", "label_smoothing": 0.1, "trainer": {"use_weighting": True}})
