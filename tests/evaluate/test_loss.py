from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from medtrain.data.chat import Encoded
from medtrain.data.examples import Example
from medtrain.errors import DataError
from medtrain.evaluate.loss import HeldOutLoss, loss_requests, measure_losses, same_tokens
from medtrain.files import write_jsonl
from medtrain.train import log_probs


@pytest.fixture(scope="module")
def model(base_dir: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base_dir).eval()


def _example(number: int) -> Example:
    return Example(str(number), "table", ({"role": "assistant", "content": "a"},), "q")


def _row(length: int, supervised_from: int, start: int = 7) -> Encoded:
    ids = [(start + 13 * i) % 500 for i in range(length)]
    return Encoded(ids, [int(i >= supervised_from) for i in range(length)])


def _measure(
    model: Any,
    directory: Path,
    examples: list[Example],
    rows: list[Encoded],
    attention: str = "auto",
) -> HeldOutLoss:
    """As the stage does it: all rows in one batch of the plan, collected, read."""
    found = dict(measure_losses(lambda: model, [loss_requests(examples, rows)], attention))
    write_jsonl(directory / "loss.jsonl", ({"id": e.id, **found[e.id]} for e in examples))
    return HeldOutLoss.read(directory / "loss.jsonl")


ROWS = [_row(9, 5), _row(30, 12, start=3), _row(6, 1, start=50), _row(30, 29, start=90)]
EXAMPLES = [_example(i) for i in range(len(ROWS))]


def test_a_rows_loss_is_that_of_transformers(model: Any, tmp_path: Path) -> None:
    import torch

    measured = _measure(model, tmp_path, EXAMPLES, ROWS)
    for example, row in zip(EXAMPLES, ROWS, strict=True):
        labels = [i if m else -100 for i, m in zip(row.input_ids, row.loss_mask, strict=True)]
        with torch.no_grad():
            expected = model(torch.tensor([row.input_ids]), labels=torch.tensor([labels])).loss
        assert measured.of(example.id) == pytest.approx(float(expected), rel=1e-5)


def test_the_mean_is_over_tokens_and_not_over_rows(model: Any, tmp_path: Path) -> None:
    measured = _measure(model, tmp_path, EXAMPLES, ROWS)
    assert [row.tokens for row in measured.rows.values()] == [4, 18, 5, 1]
    assert measured.tokens == 28
    nats = sum(row.nats for row in measured.rows.values())
    assert measured.value == pytest.approx(nats / 28)
    assert list(measured.rows) == ["0", "1", "2", "3"]


def test_batches_do_not_show_in_the_figures(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = _measure(model, tmp_path, EXAMPLES, ROWS)
    monkeypatch.setattr(log_probs, "TOKENS_A_PASS", 1)
    alone = _measure(model, tmp_path, EXAMPLES, ROWS)
    for example in EXAMPLES:
        assert together.of(example.id) == pytest.approx(alone.of(example.id), rel=1e-5)


def test_packed_and_padded_rows_lose_the_same(base_dir: Path, tmp_path: Path) -> None:
    """`eager` pads; whoever answers with the model afterwards finds its attention as it was."""
    from transformers import AutoModelForCausalLM

    each = {}
    for attention in ("auto", "eager"):
        model = AutoModelForCausalLM.from_pretrained(base_dir).eval()
        each[attention] = _measure(model, tmp_path, EXAMPLES, ROWS, attention)
        assert model.config._attn_implementation == "sdpa"
    for example in EXAMPLES:
        packed, padded = each["auto"].of(example.id), each["eager"].of(example.id)
        assert packed == pytest.approx(padded, rel=1e-5)


def test_an_untrained_model_knows_about_nothing(model: Any, tmp_path: Path) -> None:
    measured = _measure(model, tmp_path, EXAMPLES, ROWS)
    assert measured.value == pytest.approx(math.log(512), rel=0.05)


def test_a_row_beyond_the_context_is_cut_and_said_so(model: Any, tmp_path: Path) -> None:
    inside, outside = _row(700, 500), _row(700, 600)
    measured = _measure(model, tmp_path, EXAMPLES[:2], [inside, outside])
    assert measured.cut == 2
    assert {i: row.tokens for i, row in measured.rows.items()} == {"0": 12}
    assert measured.of("1") is None
    assert "2 rows cut" in measured.note


def test_nothing_to_measure_is_one_clear_error(model: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No reference answer fits"):
        _measure(model, tmp_path, EXAMPLES[:1], [_row(700, 600)])


def test_same_tokens() -> None:
    assert same_tokens(ROWS, [Encoded(*map(list, row)) for row in ROWS])
    other_mask = ROWS[0]._replace(loss_mask=[1] * 9)
    assert not same_tokens(ROWS, [other_mask, *ROWS[1:]])


def test_logits_that_are_more_than_a_product_count(tmp_path: Path) -> None:
    """RecurrentGemma caps its logits under a name that TRL's fused layer does not know."""
    import torch
    from transformers import AutoModelForCausalLM, RecurrentGemmaConfig

    config = RecurrentGemmaConfig(
        vocab_size=500, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, lru_width=32, attention_window_size=64, logits_soft_cap=1.0,
    )  # fmt: skip
    torch.manual_seed(0)
    capped = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        capped.get_output_embeddings().weight *= 50
    measured = _measure(capped, tmp_path, EXAMPLES, ROWS)
    for example, row in zip(EXAMPLES, ROWS, strict=True):
        labels = [i if m else -100 for i, m in zip(row.input_ids, row.loss_mask, strict=True)]
        with torch.no_grad():
            expected = capped(torch.tensor([row.input_ids]), labels=torch.tensor([labels])).loss
        assert measured.of(example.id) == pytest.approx(float(expected), rel=1e-5)
