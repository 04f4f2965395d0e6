"""Bad input: one message, the right exit code, no traceback, nothing finished lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from medtrain.errors import as_medtrain_error
from medtrain.run import Run
from tests.small_run import medtrain, write_config


@pytest.fixture(scope="module")
def until_pairs(tmp_path_factory: pytest.TempPathFactory, base_dir: Path) -> Path:
    """A configuration whose run is finished up to the preference pairs."""
    directory = tmp_path_factory.mktemp("until-pairs")
    base = shutil.copytree(base_dir, directory / "base")
    config = write_config(directory, base)
    result = medtrain("run", config, "--until", "pairs")
    assert result.returncode == 0, result.stderr
    return config


@pytest.fixture
def config(until_pairs: Path, tmp_path: Path) -> Path:
    """A copy of it for one test."""
    shutil.copytree(until_pairs.parent, tmp_path, dirs_exist_ok=True)
    copy = tmp_path / "small.yaml"
    copy.write_text(until_pairs.read_text().replace(str(until_pairs.parent), str(tmp_path)))
    return copy


def refused(result: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert result.returncode == code, result.stdout + result.stderr
    assert result.stderr.count("error: ") == 1, result.stderr
    assert "fix: " in result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    for word in words:
        assert word in result.stderr, result.stderr


def finished_stages(config: Path) -> list[str]:
    status = json.loads(medtrain("status", config, "--json").stdout)
    return [stage["name"] for stage in status["stages"] if stage["state"] == "done"]


@pytest.mark.parametrize(
    ("setting", "code", "words"),
    [
        ("train.strategy=fsdp2", 64, ("fsdp2 needs GPUs", "train.strategy=zero3")),
        ("train.processes=999", 78, ("train.processes is 999", "CPU cores")),
        ("train.trackers=[mlflow]", 64, ("mlflow is not installed", "pip install mlflow")),
        ("train.accelerate_config=no.yaml", 64, ("no.yaml",)),
    ],
)
def test_a_training_that_cannot_begin_here_is_refused_before_anything_is_done(
    tmp_path: Path, base_dir: Path, setting: str, code: int, words: tuple[str, ...]
) -> None:
    if "mlflow" in setting and find_spec("mlflow"):
        pytest.skip("mlflow is installed here")
    config = write_config(tmp_path, base_dir)
    refused(medtrain("run", config, setting), code, *words)
    assert not (tmp_path / "runs").exists(), "the run is as it was"


def test_a_forced_training_that_cannot_begin_here_costs_nothing(config: Path) -> None:
    run = Run(config.parent / "runs" / "small")
    before = run.config.read_bytes()
    result = medtrain("run", run.root, "--only", "sft", "--force", "sft", "train.strategy=fsdp2")
    refused(result, 64, "fsdp2 needs GPUs")
    assert run.config.read_bytes() == before
    assert finished_stages(config) == UNTIL_PAIRS


UNTIL_PAIRS = ["prepare", "sft", "merge-sft", "generate", "judge", "pairs"]


def test_missing_configuration(tmp_path: Path) -> None:
    refused(medtrain("run", tmp_path / "none.yaml"), 64, "no configuration file", "none.yaml")


def test_unknown_key_and_wrong_type(config: Path) -> None:
    result = medtrain("run", config, "sft.lorra.r=3", "dpo.beta=strong")
    refused(result, 64, "2 problems", "sft.lorra", "Did you mean 'lora'?", "dpo.beta", "'strong'")
    assert finished_stages(config) == UNTIL_PAIRS


def test_missing_data_file(config: Path) -> None:
    result = medtrain("run", config, "data.sources.0.path=./nowhere.jsonl")
    refused(result, 65, "nowhere.jsonl")


def test_a_file_that_is_no_table(config: Path) -> None:
    noise = config.with_name("noise.jsonl")
    noise.write_bytes(bytes(range(256)) * 50)
    refused(medtrain("run", config, f"data.sources.0.path={noise}"), 65, "noise.jsonl")


def test_missing_column(config: Path) -> None:
    refused(medtrain("run", config, "data.sources.0.question=query"), 65, "query")


def test_malformed_rows_are_set_aside_and_counted(config: Path) -> None:
    rows = config.with_name("rows.jsonl")
    broken = b'{"question": "cut off\n{"question": 3, "answer": "x"}\n\xff\xfe\n' + (
        b'{"question": "", "answer": "y"}\n[1, 2]\n{"question": "half \\ud800", "answer": "z"}\n'
    )
    rows.write_bytes(broken + rows.read_bytes())
    result = medtrain("run", config, "--until", "prepare")
    assert result.returncode == 0, result.stderr
    run = Run(config.parent / "runs" / "small")
    rejected = [json.loads(line) for line in run.rejected_rows.read_text().splitlines()]
    assert [row["row"] for row in rejected] == [0, 1, 2, 3, 4, 5]
    assert all(row["reason"] for row in rejected)


def test_missing_base_model(config: Path) -> None:
    refused(medtrain("run", config, "model.base=./no-such-model"), 65, "no-such-model")


def test_unreachable_endpoint_keeps_what_is_finished(config: Path) -> None:
    arguments = ["judge.kind=openai", "judge.base_url=http://127.0.0.1:9/v1", "judge.max_retries=1"]
    key = "sk-planted-1234567890"
    result = medtrain("run", config, *arguments, OPENAI_API_KEY=key)
    refused(result, 69, "127.0.0.1:9")
    assert medtrain("status", config).returncode == 0
    done = json.loads(medtrain("status", config, *arguments, "--json").stdout)["stages"]
    assert [s["state"] for s in done[:4]] == ["done"] * 4
    assert done[4]["state"] == "failed"
    assert key not in result.stdout + result.stderr
    for file in config.parent.rglob("*"):
        if file.is_file():
            assert key.encode() not in file.read_bytes(), file


def test_no_key_for_the_default_endpoint(config: Path) -> None:
    result = medtrain("run", config, "judge.kind=openai", OPENAI_API_KEY="")
    assert result.returncode in (64, 69)
    refused(result, result.returncode, "OPENAI_API_KEY")


def test_unreachable_hub(config: Path) -> None:
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(config.parent / "hub")}
    refused(medtrain("run", config, "model.base=nobody/nothing", **offline), 69, "nobody/nothing")


def test_another_base_under_a_finished_adapter(config: Path, base_dir: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    other = AutoConfig.from_pretrained(base_dir)
    other.hidden_size, other.intermediate_size = 128, 256
    AutoModelForCausalLM.from_config(other).save_pretrained(config.parent / "base")
    result = medtrain("merge", config, "--force")
    refused(result, 65, "base model changed", "--until merge-sft")


def test_an_adapter_that_does_not_fit_its_base(config: Path) -> None:
    """Somebody put another adapter in place: its receipt, like its file, is theirs."""
    from safetensors.torch import load_file, save_file

    run = Run(config.parent / "runs" / "small")
    weights = run.adapter("sft") / "adapter_model.safetensors"
    tensors = {name: tensor.repeat(2, 1)[:, : tensor.shape[1] // 2].contiguous()
               for name, tensor in load_file(weights).items()}  # fmt: skip
    save_file(tensors, weights)
    receipt_path = run.stages / "sft.json"
    receipt = json.loads(receipt_path.read_text())
    entry = receipt["outputs"]["sft/adapter/adapter_model.safetensors"]
    entry["bytes"], entry["mtime_ns"] = weights.stat().st_size, weights.stat().st_mtime_ns
    entry["sha256"] = "0" * 64
    receipt_path.write_text(json.dumps(receipt))
    refused(medtrain("merge", config), 65, "hidden size 32", "has 64")
    assert finished_stages(config)[:2] == ["prepare", "sft"]


FULL_DISK = """
set -e
mount -t tmpfs -o size={size_kb}k tmpfs {runs}
{python} -m medtrain run {config} --until prepare
head -c 100m /dev/zero > {runs}/filler 2>/dev/null || true
set +e
{python} -m medtrain run {config}
echo "FULL $?"
{python} -m medtrain status {config} --json > {out}
rm {runs}/filler
{python} -m medtrain run {config} --until merge-sft
echo "FREED $?"
"""


def test_full_disk(tmp_path: Path, base_dir: Path) -> None:
    mount = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    allowed = subprocess.run([*mount, f"mount -t tmpfs tmpfs {tmp_path}"], capture_output=True)
    if allowed.returncode:
        pytest.skip("this machine does not let a test mount a small file system")
    config = write_config(tmp_path, base_dir)
    (tmp_path / "runs").mkdir()
    script = FULL_DISK.format(
        size_kb=6000, runs=tmp_path / "runs", python=sys.executable, config=config,
        out=tmp_path / "status.json",
    )  # fmt: skip
    result = subprocess.run(
        [*mount, script], capture_output=True, text=True, env={**os.environ}, timeout=300
    )
    assert "FULL 75" in result.stdout, result.stdout + result.stderr
    assert "The disk is full" in result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["stages"][0]["state"] == "done"
    assert "FREED 0" in result.stdout, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/x/.lock"), 64, "/x/.lock may not be"),
        (OSError(errno.EROFS, "Read-only file system", "/x/run"), 64, "Read-only"),
        (OSError(errno.EDQUOT, "Quota"), 75, "The disk is full"),
        (ValueError("odd"), 70, "ValueError: odd"),
    ],
)
def test_errors_of_the_system_in_a_users_words(error: Exception, code: int, words: str) -> None:
    known = as_medtrain_error(error)
    assert known.exit_code == code
    assert words in known.message
    assert known.fix


def test_a_run_directory_that_cannot_be(tmp_path: Path, base_dir: Path) -> None:
    config = write_config(tmp_path, base_dir)
    (tmp_path / "taken").write_text("")
    refused(medtrain("run", config, f"output_dir={tmp_path / 'taken'}"), 64, "cannot be made")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = medtrain("run", tmp_path / "none.yaml", "--debug")
    assert result.returncode == 64
    assert "Traceback" in result.stderr
