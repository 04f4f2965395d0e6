"""The benchmarks of training, at a size where they measure nothing: they run, and compare alike."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.small_run import write_rows

BENCH = Path(__file__).parents[2] / "bench"


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=BENCH,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=500,
        check=False,
    )


def check_both_sides_learn_alike(printed: str, stage: str) -> None:
    """The same rows in as many steps: TRL's forward passes halved, and the loss as TRL's."""
    table = printed[printed.index(f"{stage}: ") :]
    sides = re.findall(r"(plain TRL|medtrain) .*?([\d.]+) forward passes a step +loss (\S+)", table)
    (plain, padded, plain_loss), (ours, packed, our_loss) = sides[:2]
    assert (plain, ours) == ("plain TRL", "medtrain")
    assert float(padded) == 2
    assert float(packed) == 1
    assert float(our_loss) == pytest.approx(float(plain_loss), abs=0.01)
    assert "ratio" in table


def test_training_is_compared_with_plain_trl(base_dir: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    lengths = ("--sft-length", "512", "--dpo-length", "512")
    result = run("train.py", base_dir, rows, "--steps", "2", "--repeat", "1", *lengths)
    assert result.returncode == 0, result.stderr
    for stage in ("sft", "dpo"):
        check_both_sides_learn_alike(result.stdout, stage)


def test_a_random_model_is_as_large_as_a_quantised_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear layers in 4 bits, the rest in the compute dtype."""
    monkeypatch.syspath_prepend(str(BENCH))
    import torch
    from random_llama import TINY, random_llama  # type: ignore[import-not-found]
    from transformers import LlamaConfig

    from medtrain.memory import Work
    from medtrain.memory.architecture import from_config
    from medtrain.memory.estimate import base_bytes
    from medtrain.memory.measure import model_tensors, tensor_bytes

    shape = LlamaConfig(**{**TINY, "hidden_size": 256, "intermediate_size": 1024})
    model = random_llama(shape, dtype=torch.bfloat16, device=torch.device("cpu"), attention=None)
    architecture = from_config(shape.to_dict())
    assert architecture is not None
    work = Work(1, 0, 2, True, True, None, 8, False)  # type: ignore[arg-type]
    expected = sum(base_bytes(architecture, work))
    assert tensor_bytes(model_tensors(model)) == pytest.approx(expected, rel=0.02)
    again = random_llama(shape, dtype=torch.bfloat16, device=torch.device("cpu"), attention=None)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one.data.view(torch.uint8), other.data.view(torch.uint8))
