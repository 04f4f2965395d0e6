"""FSDP2 on CPUs, where accelerate has to be made to recognise it: as on GPUs, but slowly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from medtrain.errors import ConfigError
from medtrain.files import read_jsonl
from medtrain.run import Run
from medtrain.train.adapter import WEIGHTS_FILE
from medtrain.train.fsdp import refuse_new_tokens
from tests.small_run import accelerate, medtrain, write_config
from tests.tiny import tiny_base

FSDP2 = Path(__file__).parents[2] / "configs" / "accelerate" / "fsdp2.yaml"
_CHILD = """
import accelerate.state
import transformers.training_args
from accelerate.utils import DistributedType
from medtrain.launch import stage
from medtrain.train import fsdp

transformers.training_args.is_torch_bf16_gpu_available = lambda: True
accelerate.state.PartialState._prepare_backend = lambda *args, **kwargs: (
    "gloo", DistributedType.MULTI_GPU)
stage.refuse = lambda *args, **kwargs: None  # of FSDP2 on a CPU
theirs = fsdp.whole_weights

def whole_weights(model):
    weight = model.get_base_model().model.layers[0].mlp.down_proj.base_layer.weight
    here = weight.numel() // weight.to_local().numel()
    # In one write, or the other process's words would come between.
    print(f"BASE {here} {weight.dtype}\\n", end="", flush=True)
    return theirs(model)

fsdp.whole_weights = whole_weights

from medtrain.cli import main
main()
"""
SETTINGS = ("sft.max_steps=4", "sft.log_every=1", "sft.lora.dropout=0", "model.dtype=bfloat16")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration whose base knows the chat's tokens, its run prepared and trained by one."""
    directory = tmp_path_factory.mktemp("fsdp2")
    config = write_config(directory, tiny_base(directory / "base", chat_tokens=True))
    one = medtrain("run", config, "--until", "sft", *SETTINGS, "sft.batch_size=4",
                   OMP_NUM_THREADS="1")  # fmt: skip
    assert one.returncode == 0, one.stderr
    return config


def losses(run: Run) -> list[float]:
    return [line["loss"] for line in read_jsonl(run.metrics("sft")) if line["kind"] == "train"]


def test_an_adapter_is_trained_on_a_sharded_base_and_saved_whole(
    prepared: Path, tmp_path: Path
) -> None:
    alone = Run(prepared.parent / "runs" / "small")
    overrides = (*SETTINGS, "sft.batch_size=2", f"output_dir={tmp_path}")
    done = medtrain("run", prepared, "--until", "prepare", *overrides)
    assert done.returncode == 0, done.stderr
    run = Run(tmp_path / "small")
    (tmp_path / "child.py").write_text(_CHILD)
    done = accelerate(FSDP2, tmp_path / "child.py", "sft", run.root)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "BASE 2 torch.bfloat16" in done.stdout, "half of it is in each process"
    # bfloat16 has three digits; what is summed, and the loss, have more.
    assert losses(run) == pytest.approx(losses(alone), rel=5e-3)
    ours, theirs = (load_file(r.adapter("sft") / WEIGHTS_FILE) for r in (run, alone))
    assert {name: weight.shape for name, weight in ours.items()} == {
        name: weight.shape for name, weight in theirs.items()
    }
    assert {weight.dtype for weight in ours.values()} == {torch.float32}
    assert all(bool(weight.any()) for name, weight in ours.items() if "lora_B" in name)


def test_rows_of_new_tokens_are_refused() -> None:
    refuse_new_tokens([])
    with pytest.raises(ConfigError, match="rows of 2 new tokens") as caught:
        refuse_new_tokens([512, 513])
    assert "zero3" in caught.value.fix
