"""A run ready to be trained: tokenizer, training rows and preference pairs of the tiny base."""

from __future__ import annotations

import gc
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from medtrain.config import RunConfig, dump_config, parse_config
from medtrain.console import Console
from medtrain.data.chat import ChatTokenizer
from medtrain.data.tokenizer import load_chat_tokenizer, prepare_tokenizer
from medtrain.files import write_jsonl, write_text
from medtrain.run import Run

# Threads that wait for each other on shared cores make tiny steps 20 times slower.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

_TOPICS = ("anaemia", "asthma", "diabetes", "fever", "migraine", "eczema", "gout", "insomnia")
_ASKED = ("What causes {}?", "How is {} treated?", "Is {} dangerous?", "Can {} be cured?")
_GOOD = "Please consult a healthcare provider about {}; exercise and medicine help most patients."
_BAD = "No idea about {}."


class Ready(NamedTuple):
    """What a training stage is called with."""

    run: Run
    config: RunConfig
    console: Console

    @property
    def chat(self) -> ChatTokenizer:
        return load_chat_tokenizer(self.run)


MakeRun = Callable[..., Ready]


def make_ready(root: Path, base: Path, *, rows: int = 48, **sections: Any) -> Ready:
    """Write a run directory; `sft`, `dpo` and `model` override single keys of their sections."""
    run = Run(root)
    run.create()
    run.data.mkdir(exist_ok=True)
    tree: dict[str, Any] = {
        "name": root.name,
        "output_dir": str(root.parent),
        "model": {"base": str(base), "system_prompt": None},
        "data": {"sources": [{"adapter": "table", "path": "rows.jsonl"}]},
        "sft": {"epochs": 2, "learning_rate": 5e-3, "batch_size": 8, "validation_fraction": 0.2,
                "max_length": 128, "log_every": 2, "lora": {"r": 4, "alpha": 8}},
        "dpo": {"epochs": 1, "learning_rate": 1e-3, "batch_size": 4, "validation_fraction": 0.2,
                "max_length": 128, "log_every": 2, "gradient_accumulation": 2},
    }  # fmt: skip
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    config = parse_config(tree)
    write_text(run.config, dump_config(config))
    prepare_tokenizer(run, config)
    write_rows(run, rows)
    return Ready(run, config, Console(run.log, quiet=True))


def write_rows(run: Run, count: int) -> None:
    drawn = random.Random(0)
    examples, pairs = [], []
    for number in range(count):
        topic = drawn.choice(_TOPICS)
        question = f"{drawn.choice(_ASKED).format(topic)} ({number})"
        asked = {"role": "user", "content": question}
        answered = {"role": "assistant", "content": _GOOD.format(topic)}
        examples.append({"id": f"{number:016x}", "source": "table", "question": question,
                         "messages": [asked, answered]})  # fmt: skip
        pairs.append({"id": f"{number:016x}:0-1", "source": "table", "prompt": [asked],
                      "chosen": _GOOD.format(topic), "rejected": _BAD.format(topic)})  # fmt: skip
    write_jsonl(run.train_rows, examples)
    write_jsonl(run.preferences, pairs)


@pytest.fixture
def make_run(tmp_path: Path, base_dir: Path) -> MakeRun:
    """Make a run directory of a name, on the tiny base unless told otherwise."""

    def make(name: str = "run", **options: Any) -> Ready:
        return make_ready(tmp_path / name, options.pop("base", base_dir), **options)

    return make


@pytest.fixture(scope="session", autouse=True)
def quick_collections() -> Iterator[None]:
    """accelerate collects garbage before every training: of imported modules there is none."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def sft_done(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Ready:
    """A run whose SFT is done and whose reference is computed; it must stay as it is."""
    from medtrain.train.reference import compute_reference
    from medtrain.train.sft import train_sft

    root = tmp_path_factory.mktemp("sft-done") / "run"
    ready = make_ready(root, base_dir, sft={"max_steps": 6})
    train_sft(*ready)
    compute_reference(*ready)
    return ready


@pytest.fixture
def make_dpo_run(make_run: MakeRun, sft_done: Ready) -> MakeRun:
    """Make a run directory like `make_run`, its SFT and its reference done."""

    def make(name: str = "run", **options: Any) -> Ready:
        ready = make_run(name, **options)
        give_sft(sft_done, ready)
        return ready

    return make


def give_sft(done: Ready, ready: Ready) -> None:
    """Copy what DPO starts from into a run of the same rows."""
    shutil.copytree(done.run.adapter("sft"), ready.run.adapter("sft"), dirs_exist_ok=True)
    ready.run.reference.parent.mkdir(exist_ok=True)
    shutil.copyfile(done.run.reference, ready.run.reference)


def adapter_bytes(run: Run, stage: Any) -> dict[str, bytes]:
    """Every file of a published adapter."""
    directory = run.adapter(stage)
    return {p.name: p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}
