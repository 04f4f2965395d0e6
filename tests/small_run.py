"""A whole run that takes seconds: the tiny base, sixty made-up rows, the rules judge."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import yaml

CONDITIONS = (
    "asthma", "anaemia", "eczema", "gout", "migraine", "insomnia", "sciatica", "vertigo",
    "psoriasis", "bronchitis", "tonsillitis", "sinusitis",
)  # fmt: skip
QUESTIONS = {
    "What is {}?": "It is a common condition. {} can be mild or severe. Please ask your doctor.",
    "What causes {}?": "The causes of {} differ. I understand your worry. Age and habits matter.",
    "How is {} treated?": "Treatment of {} depends on the person. Rest and medicine may help.",
    "When should I see a doctor about {}?": "See a doctor if {} gets worse or does not go away.",
    "Can {} be prevented?": "Not always. Healthy habits lower the risk of {}. Consult a doctor.",
}


def write_rows(path: Path) -> Path:
    """Sixty questions with answers, as JSON lines."""
    rows = [
        {"question": question.format(condition), "answer": answer.format(condition)}
        for condition in CONDITIONS
        for question, answer in QUESTIONS.items()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_config(directory: Path, base: Path) -> Path:
    """The configuration of the small run, its rows beside it, its runs below it."""
    rows = write_rows(directory / "rows.jsonl")
    tree = {
        "output_dir": str(directory / "runs"),
        "model": {"base": str(base), "dtype": "float32", "system_prompt": "Be kind."},
        "data": {
            "eval_fraction": 0.15,
            "preference_prompts_from": "train",
            "max_preference_prompts": 24,
            "near_duplicates": 1.0,
            "sources": [{"adapter": "table", "path": str(rows)}],
        },
        "sft": {"max_steps": 8, "batch_size": 4, "max_length": 256, "log_every": 1,
                "learning_rate": 5e-3, "evals_per_epoch": 2, "lora": {"r": 4}},
        "dpo": {"max_steps": 4, "batch_size": 4, "max_length": 256, "log_every": 1,
                "evals_per_epoch": 2},
        "merge": {"kl_prompts": 2},
        "generate": {"max_new_tokens": 12, "temperature": 1.0},
        "judge": {"kind": "rules"},
        "evaluate": {"max_new_tokens": 12},
    }  # fmt: skip
    path = directory / "small.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


_OF_LAUNCHERS = ("ACCELERATE_", "FSDP_", "DS_", "MEDTRAIN_", "PET_", "TORCHELASTIC_")


def accelerate(
    file: Path, script: Path, *arguments: str | Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`accelerate launch` of two processes on a CPU, as a person types it.

    Training inside pytest's process leaves variables behind that would speak to the launcher.
    """
    surroundings = {k: v for k, v in os.environ.items() if not k.startswith(_OF_LAUNCHERS)}
    surroundings |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
                     "ACCELERATE_TORCH_DEVICE": "cpu"}  # fmt: skip
    launch = ["-m", "accelerate.commands.launch", f"--config_file={file}", "--num_processes=2"]
    return subprocess.run(
        [sys.executable, *launch, str(script), *map(str, arguments)],
        env={**surroundings, **environment},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


def torchrun(
    script: Path, *arguments: str | Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`torchrun` of two processes on a CPU."""
    surroundings = {k: v for k, v in os.environ.items() if not k.startswith(_OF_LAUNCHERS)}
    surroundings |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [sys.executable, *launch, str(script), *map(str, arguments)],
        env={**surroundings, **environment},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


def medtrain(
    *arguments: str | Path, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own; print what launched processes died of."""
    done = subprocess.run(
        [sys.executable, "-m", "medtrain", *map(str, arguments)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        cwd=cwd,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
        timeout=600,
        check=False,
    )
    for log in re.findall(r"\S+\.launch\S*\.log", done.stderr):
        print(Path(log).read_text(errors="replace")[-4000:])
    return done
