"""`medtrain submit --dry-run`: every script stands as a golden file, and nothing is touched.

After a wanted change, renew the files and read the difference:

    MEDTRAIN_RENEW_GOLDEN=1 pytest -n 0 tests/cluster/test_dry_run.py; git diff tests/cluster/golden
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from medtrain.cluster.chain import plan_chain, steps_of
from medtrain.cluster.dispatch import Dispatcher
from medtrain.config import load_config
from medtrain.run import Run
from medtrain.stages import STAGES
from tests.small_run import medtrain, write_config

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
RENEW = "MEDTRAIN_RENEW_GOLDEN"
SITE = {
    "account": "nlp",
    "partition": "gpu",
    "qos": "long",
    "gpu_type": "a100",
    "gpus": 4,
    "cpus": 32,
    "mem_gb": 240,
    "time_min": 720,
    "sbatch": {"mail-type": "FAIL,REQUEUE", "exclusive": True},
    "stages": {
        "cpu": {"partition": "cpu", "cpus": 4, "mem_gb": 16, "time_min": 60},
        "sft": {"nodes": 2},
        "dpo": {"nodes": 2},
        "judge": {"partition": "transfer", "cpus": 2, "mem_gb": 8},
        "generate": {"gpus": 1, "cpus": 8, "mem_gb": 60},
    },
    "parallelism": 8,
    "modules": ["cuda/12.6", "apptainer"],
    "activate": "source /shared/envs/medtrain/bin/activate",
    "container": "apptainer exec --nv /shared/images/medtrain.sif",
    "python": "/usr/bin/python3",
    "srun": ["--mpi=none", "--container-mounts=/shared data:/data"],
    "environment": {"NCCL_DEBUG": "WARN", "NOTE": "it's quoted"},
    "hf_home": "/shared/huggingface",
}
CASES = {
    "quickstart": (
        "configs/quickstart.yaml",
        ["cluster.cpus=2", "cluster.mem_gb=2", "cluster.time_min=30", "generate.num_shards=3",
         "judge.num_shards=1", "evaluate.num_shards=2"],
    ),
    "llama3-8b-medqa": (
        "configs/llama3-8b-medqa.yaml",
        ["generate.num_shards=16", "judge.num_shards=2", "evaluate.num_shards=4"],
    ),
}  # fmt: skip


@pytest.fixture
def without_slurm(tmp_path: Path) -> dict[str, str]:
    """A PATH on which there is no Slurm, and one width for tables."""
    (tmp_path / "bin").mkdir()
    return {"PATH": str(tmp_path / "bin"), "COLUMNS": "100"}


def dry_run(name: str, tmp_path: Path, environment: dict[str, str]) -> str:
    config, overrides = CASES[name]
    if name != "quickstart":
        site = tmp_path / "site.yaml"
        site.write_text(yaml.safe_dump(SITE))
        environment = {**environment, "MEDTRAIN_SITE": str(site), "OPENAI_API_KEY": "sk-planted"}
    output = [f"output_dir={tmp_path}/the runs", *overrides]
    done = medtrain("submit", ROOT / config, *output, "--dry-run", cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sk-planted" not in done.stdout + done.stderr
    for found, named in (
        (f"{tmp_path}/the runs", "<RUNS>"),
        # The environment may lie in the repository.
        (sys.executable, "<PYTHON>"),
        (str(ROOT), "<REPOSITORY>"),
    ):
        done.stdout = done.stdout.replace(found, named)
    return "".join(f"{line.rstrip()}\n" for line in done.stdout.splitlines())


@pytest.mark.parametrize("name", CASES)
def test_scripts_and_graph(name: str, tmp_path: Path, without_slurm: dict[str, str]) -> None:
    shown, golden = dry_run(name, tmp_path, without_slurm), GOLDEN / f"{name}.txt"
    if os.environ.get(RENEW):
        golden.write_text(shown)
    assert shown == golden.read_text(), f"if this is wanted: {RENEW}=1 (see the top of this file)"


def scripts_of(shown: str) -> dict[str, str]:
    """The scripts of a dry run, by the name of their job; what training sources is one too."""
    blocks = re.split(r"^##### (.+)\n", shown, flags=re.MULTILINE)[1:]
    texts = (text.partition("\njob ")[0] for text in blocks[1::2])
    return {
        name: text[text.index("#!") :] if "#!" in text else f"#!/bin/bash\n{text}"
        for name, text in zip(blocks[::2], texts, strict=True)
    }


@pytest.mark.parametrize("name", CASES)
def test_scripts_are_sound_bash(name: str, tmp_path: Path) -> None:
    scripts = scripts_of((GOLDEN / f"{name}.txt").read_text())
    assert {"prepare", "sft", "sft: setup.sh", "generate.candidates"} <= set(scripts)
    for job, text in scripts.items():
        path = tmp_path / f"{job.replace('/', '-')}.sh"
        path.write_text(text.replace("<REPOSITORY>", "/repository").replace("<PYTHON>", "python3"))
        checks = [["bash", "-n", path]]
        if shutil.which("shellcheck"):
            # What a site's `activate` sources is not here.
            checks.append(["shellcheck", "--exclude=SC1091", path])
        for check in checks:
            done = subprocess.run(check, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{job}: {done.stdout}{done.stderr}"


def tree_of(root: Path) -> dict[str, tuple[int, int, int]]:
    paths = (path for path in root.rglob("*") if not stat.S_ISFIFO(path.lstat().st_mode))
    looks = {str(path): path.lstat() for path in [root, *paths]}
    return {path: (s.st_mtime_ns, s.st_size, s.st_mode) for path, s in looks.items()}


@pytest.mark.parametrize("begun", [False, True], ids=["new", "begun"])
def test_a_dry_run_touches_nothing(
    begun: bool, tmp_path: Path, base_dir: Path, without_slurm: dict[str, str]
) -> None:
    config = write_config(tmp_path, base_dir)
    if begun:
        assert medtrain("run", config, "--until", "prepare").returncode == 0
    before = tree_of(tmp_path)
    done = medtrain("submit", config, "--dry-run", cwd=tmp_path, **without_slurm)
    assert done.returncode == 0, done.stderr
    assert tree_of(tmp_path) == before
    assert ("##### prepare" in done.stdout) == (not begun)
    assert "##### sft\n" in done.stdout


def test_arrays_above_the_limit_are_split(tmp_path: Path, base_dir: Path) -> None:
    config = load_config(write_config(tmp_path, base_dir), ["generate.num_shards=11"])
    jobs = plan_chain(steps_of([s for s in STAGES if s.name == "generate"], config), config)
    array = next(job for job in jobs if job.tasks)
    texts = [
        script.text
        for script in Dispatcher(Run(tmp_path / "run"), config, max_array_size=5).scripts(array)
    ]
    asked = [re.findall(r"#SBATCH --array=(\S+)", text) for text in texts]
    assert asked == [["0-4%5"], ["0-4%5"], []], "a one-task array is a plain job to submitit"
    assert not (tmp_path / "run").exists()


def test_what_is_done_is_left_out(tmp_path: Path, base_dir: Path) -> None:
    config = write_config(tmp_path, base_dir)
    done = medtrain("submit", config, "--dry-run", "--from", "judge", "--until", "pairs")
    assert done.returncode == 0, done.stderr
    assert set(scripts_of(done.stdout)) == {
        "judge.verdicts.open", "judge.verdicts", "judge.verdicts.close",
    }  # fmt: skip
    refused = medtrain("submit", config, "--dry-run", "--from", "pairs", "--until", "judge")
    assert refused.returncode == 64
