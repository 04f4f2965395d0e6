"""bench/gpu.py at a size where it measures nothing: every part runs, and says what it is to say."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench.test_bench_train import BENCH, run

WITHOUT_BITSANDBYTES = """
import importlib.util, runpy, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "bitsandbytes" else found(name, *a)
sys.argv = ["gpu.py"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SAYS = {
    "facts": ("torch", "product", "NF4 here and on the CPU", "pass"),
    "sft": ("plain TRL", "medtrain is", "estimated peak", "adapters by PEFT", "16-bit base"),
    "dpo": ("plain TRL", "medtrain is", "estimated peak"),
    "decoding": ("model.generate", "medtrain without a graph", "medtrain batch by batch"),
    "attention": ("attention by rows", "lengths not seen before"),
    "profile": ("sft 8b 4 × 8 profile", "dpo 8b", "launches a step"),
    "waits": ("sft waits of the host", "dpo waits of the host"),
    "memory": ("sft middle", "dpo middle", "checkpointing", "16-bit base"),
}


def bench(*arguments: str, out: Path) -> subprocess.CompletedProcess[str]:
    return run("gpu.py", "--tiny", "--out", out, *arguments)


def check(done: subprocess.CompletedProcess[str], out: Path, *parts: str) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    for part in parts:
        told = done.stdout[done.stdout.rindex(f"\n{part}: ok") :]
        assert all(word in told for word in SAYS[part]), told
        assert json.loads((out / f"{part}.json").read_text())["figures"]
    assert "FAILED" not in done.stdout


@pytest.mark.parametrize(
    "parts",
    [("facts", "attention"), ("dpo", "waits"), ("profile", "memory"), ("decoding",)],
    ids="-".join,
)
def test_every_part_runs_on_a_cpu(parts: tuple[str, ...], tmp_path: Path) -> None:
    check(bench(*parts, out=tmp_path), tmp_path, *parts)


def test_both_sides_of_sft_learn_alike(tmp_path: Path) -> None:
    """The same rows in as many steps: TRL's forward passes halved, and the loss as TRL's."""
    done = bench("sft", out=tmp_path)
    check(done, tmp_path, "sft")
    found = json.loads((tmp_path / "sft.json").read_text())
    ours, plain = (
        found["details"][f"sft 8b 2 × 2 {side}"]["forwards_a_step"]
        for side in ("medtrain", "plain TRL")
    )
    assert (ours, plain) == (1, 2)
    losses = re.search(r"loss ([\d.]+), medtrain's ([\d.]+)", done.stdout)
    assert losses is not None
    assert float(losses[1]) == pytest.approx(float(losses[2]), abs=0.01)


def test_what_was_found_before_a_limit_counts(tmp_path: Path) -> None:
    done = bench("facts", "attention", "--budget", "16", out=tmp_path)
    assert done.returncode == 1
    assert "facts: stopped at its limit of 11 s" in done.stdout or "facts: ok" in done.stdout
    assert "machine" in json.loads((tmp_path / "facts.json").read_text())["figures"]
    assert "attention: no time left" in done.stdout


def test_a_part_that_nobody_knows_is_named() -> None:
    done = run("gpu.py", "--tiny", "cooking")
    assert done.returncode == 2
    assert "no such part: cooking" in done.stderr


def test_without_a_card_it_says_so() -> None:
    done = run("gpu.py", "facts")
    assert done.returncode == 1
    assert "there is no CUDA GPU" in done.stderr


def test_what_is_not_installed_is_named() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_BITSANDBYTES], capture_output=True, text=True, cwd=BENCH,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "bitsandbytes not installed" in done.stderr


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>", "attention"),
        ("kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>", "NF4 dequantising"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNN", "matrix products"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add>",
         "copies, casts, elementwise"),
        ("triton_poi_fused_add_mul_0", "other compiled kernels"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("something else", "other"),
    ],
)  # fmt: skip
def test_kernels_are_sorted_by_what_they_do(
    kernel: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    from steps import by_kind  # type: ignore[import-not-found]

    assert by_kind([(kernel, 1.0)]) == {kind: 1.0}
