"""The estimate of a configuration against its real training stage, on a CPU.

All rows are cut to the same length, so that the largest forward pass is the one that the estimate
is about.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from medtrain.config import RunConfig, parse_config
from medtrain.console import Console
from medtrain.data.prepare import prepare
from medtrain.memory import architecture_of, estimate, work_of
from medtrain.memory.measure import measure
from medtrain.run import Run
from medtrain.train.sft import train_sft
from tests.small_run import write_rows
from tests.tiny import VOCAB_SIZE

TOLERANCE = 0.15


def base_of(directory: Path, tokenizer_from: Path) -> Path:
    """A random base of 5 million parameters with the tiny base's tokenizer."""
    shutil.copytree(tokenizer_from, directory)
    (directory / "model.safetensors").unlink()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=256, intermediate_size=768, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def ready(directory: Path, base: Path, **sft: Any) -> tuple[Run, RunConfig]:
    """A run whose data are prepared: rows of 160 tokens, four of them a forward pass."""
    rows = write_rows(directory / "rows.jsonl")
    long = [json.loads(line) for line in rows.read_text().splitlines()]
    for row in long:
        row["answer"] = " ".join([row["answer"]] * 8)
    rows.write_text("".join(json.dumps(row) + "\n" for row in long))
    config = parse_config({
        "name": "measured",
        "model": {"base": str(base), "dtype": "float32"},
        "data": {
            "near_duplicates": 1.0,
            "filters": {"too_long": "truncate"},
            "sources": [{"adapter": "table", "path": str(rows)}],
        },
        "sft": {"max_steps": 2, "batch_size": 4, "gradient_accumulation": 2, "max_length": 160,
                "eval_batch_size": 2, "loss_on": "all", "lora": {"r": 8}, **sft},
    })  # fmt: skip
    run = Run(directory / "measured")
    run.logs.mkdir(parents=True)
    prepare(run, config, Console(quiet=True))
    return run, config


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_sft_stage_takes_what_its_configuration_is_estimated_to(
    checkpointing: bool, base_dir: Path, tmp_path: Path
) -> None:
    base = base_of(tmp_path / "base", base_dir)
    run, config = ready(tmp_path, base, activation_checkpointing=checkpointing)
    architecture = architecture_of(config)
    assert architecture is not None
    work = work_of(config, "sft", architecture, device="cpu")
    assert (work.tokens, work.new_rows) == (640, True)
    quiet = Console(quiet=True)
    measured = measure(lambda: train_sft(run, config, quiet), torch.device("cpu"))
    expected = estimate(architecture, work, checkpointing=checkpointing)
    assert expected.allocated == pytest.approx(measured.peak, rel=TOLERANCE)
