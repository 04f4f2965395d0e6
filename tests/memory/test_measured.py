"""The estimate against what training really allocates, on a CPU.

Every part of the formulas is seen here: weights in 4 bits to the byte, adapters, gradients and
optimiser state, what layers keep with and without checkpointing, and the fused output layer. The
estimate is to be within 15 % of the peak.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from medtrain.memory import estimate
from medtrain.memory.estimate import base_bytes, trained_parameters
from medtrain.memory.measure import measure, model_tensors, tensor_bytes
from tests.memory.small_model import CPU, Setup, build, evaluate, train

TOLERANCE = 0.15
WIDE = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 3,
        "num_attention_heads": 8, "num_key_value_heads": 8}  # fmt: skip
DEEP = {"num_hidden_layers": 12}
LARGE_VOCABULARY = {"vocab_size": 32_768, "hidden_size": 512, "num_hidden_layers": 2}
THIN_OUTPUT = {"vocab_size": 128, "intermediate_size": 4096, "num_hidden_layers": 1}
FEW = ["q_proj", "v_proj"]

SETUPS = {
    "nf4": Setup(),
    "nf4-few-targets": Setup(targets=FEW),
    "nf4-checkpointing": Setup(checkpointing=True),
    "nf4-no-dropout-deep-checkpointing": Setup(dropout=0.0, checkpointing=True, sizes=DEEP),
    "nf4-wide-long": Setup(targets=FEW, dropout=0.0, tokens=2048, sizes=WIDE),
    "nf4-fused": Setup(fused=True),
    "nf4-fused-few-targets": Setup(fused=True, targets=FEW),
    "nf4-fused-no-dropout": Setup(fused=True, dropout=0.0),
    "nf4-fused-checkpointing": Setup(fused=True, checkpointing=True),
    "float32-fused": Setup(fused=True, quantized=False),
    "bfloat16-fused": Setup(fused=True, dropout=0.0, dtype=torch.bfloat16),
    "float32": Setup(quantized=False),
    "float32-no-dropout": Setup(quantized=False, dropout=0.0),
    # PEFT asks for CUDA's autocast when it decides on casts, so dropout is another thing on a CPU.
    "bfloat16-no-dropout": Setup(dropout=0.0, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("name", SETUPS)
def test_layers_take_what_is_estimated(name: str, tmp_path: Path) -> None:
    setup = SETUPS[name]
    model, architecture = build(setup, tmp_path)
    measured = measure(lambda: train(model, setup, whole=False), CPU, model_tensors(model))
    expected = estimate(architecture, setup.work, checkpointing=setup.checkpointing)
    estimated = expected.resident + expected.activations + expected.temporary
    assert estimated == pytest.approx(measured.peak, rel=TOLERANCE)


@pytest.mark.parametrize(
    "setup",
    [
        Setup(),
        Setup(targets=FEW, checkpointing=True),
        Setup(new_rows=True, tokens=128, sizes=LARGE_VOCABULARY),
        Setup(quantized=False, tokens=512, sizes=WIDE),
        Setup(fused=True),
    ],
    ids=["nf4", "nf4-checkpointing", "new-rows", "float32", "nf4-fused"],
)
def test_a_whole_step_takes_what_is_estimated(setup: Setup, tmp_path: Path) -> None:
    model, architecture = build(setup, tmp_path)
    measured = measure(lambda: train(model, setup), CPU, model_tensors(model))
    expected = estimate(architecture, setup.work, checkpointing=setup.checkpointing)
    assert expected.allocated == pytest.approx(measured.peak, rel=TOLERANCE)


@pytest.mark.parametrize(
    "setup",
    [
        Setup(evaluated_tokens=2048),
        Setup(evaluated_tokens=8192, sizes=THIN_OUTPUT),
        Setup(evaluated_tokens=1024, new_rows=True, sizes=LARGE_VOCABULARY),
    ],
    ids=["nf4", "many-tokens", "new-rows"],
)
def test_an_evaluation_takes_what_is_estimated(setup: Setup, tmp_path: Path) -> None:
    model, architecture = build(setup, tmp_path)
    measured = measure(lambda: evaluate(model, setup), CPU, model_tensors(model))
    expected = estimate(architecture, setup.work)
    resident = tensor_bytes(model_tensors(model))
    assert resident + expected.evaluation == pytest.approx(measured.peak, rel=TOLERANCE)


@pytest.mark.parametrize("new_rows", [False, True])
@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("targets", ["all-linear", FEW])
def test_weights_and_adapters_are_counted_to_the_byte(
    quantized: bool, new_rows: bool, targets: str | list[str], tmp_path: Path
) -> None:
    setup = Setup(quantized=quantized, targets=targets, new_rows=new_rows)
    model, architecture = build(setup, tmp_path)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == trained_parameters(architecture, setup.work)
    weights = tensor_bytes(model_tensors(model)) - tensor_bytes(trained)
    # A hundredth: the code book of every quantised layer, and rotary frequencies.
    assert sum(base_bytes(architecture, setup.work)) == pytest.approx(weights, rel=0.01)


def test_measuring_sees_what_is_gone_again() -> None:
    kept = torch.zeros(1000)

    def work() -> None:
        first = torch.ones(50_000)
        del first
        torch.ones(80_000)

    measured = measure(work, CPU, [kept, kept.view(10, 100)])
    assert measured.before == 4000
    assert measured.peak == pytest.approx(4000 + 4 * 80_000, rel=0.01)
