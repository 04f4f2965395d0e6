"""`prepare --fetch`: the cache is filled where there is a network, and jobs find all of it.

The hub is one of this machine (tests/data/hub.py); the command runs in processes of its own, since
the hub's libraries read their switches when they are imported.
"""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from medtrain.config import RunConfig, parse_config
from medtrain.data.hub_model import size
from medtrain.data.needs import datasets_needed, models_needed
from medtrain.errors import DataError
from tests.data.hub import Hub, Repository, serving
from tests.small_run import medtrain, write_rows
from tests.tiny import shared_directory, tiny_base

TOKEN = "hf_thisIsNoRealToken"
OTHER_FORMS = {
    "consolidated.safetensors": b"x",
    "pytorch_model.bin": b"x",
    "onnx/model.onnx": b"x",
    "original/params.json": b"x",
    "README.md": b"x",
    "modeling_tiny.py": b"raise SystemExit",
}


@dataclass
class Site:
    """A login node: a directory, and a hub that it reaches."""

    directory: Path
    hub: Hub

    @property
    def cache(self) -> Path:
        return self.directory / "hf"

    def config(self, **sections: Any) -> Path:
        """A configuration that takes its base and its rows from the hub."""
        tree: dict[str, Any] = {
            "output_dir": str(self.directory / "runs"),
            "model": {"base": "org/tiny", "dtype": "float32", "quantization": "none"},
            "data": {"eval_fraction": 0.2, "near_duplicates": 1.0,
                     "sources": [{"adapter": "table", "path": "org/rows"}]},
            "sft": {"max_steps": 2, "max_length": 256, "learning_rate": 5e-3, "warmup_ratio": 0},
            "judge": {"kind": "rules"},
            "cluster": {"hf_home": str(self.cache)},
        }  # fmt: skip
        path = self.directory / "site.yaml"
        path.write_text(yaml.safe_dump({**tree, **sections}))
        return path

    def fetch(self, config: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        online = {
            "HF_ENDPOINT": self.hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "",
        }
        return medtrain("prepare", config, "--fetch", cwd=None, **{**online, **environment})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a base in two safetensors files, as large ones are, with the other forms of the
    same weights that repositories hold."""
    built = shared_directory(tmp_path_factory.getbasetemp()) / "tiny-base-in-parts"
    whole = tiny_base(built, chat_tokens=True)
    parts = tmp_path_factory.mktemp("parts")
    _save_in_parts(whole, parts)
    files = {f.name: f.read_bytes() for f in (*whole.iterdir(), *parts.iterdir()) if f.is_file()}
    del files["model.safetensors"]
    return {**files, **OTHER_FORMS}


def _save_in_parts(whole: Path, parts: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(whole / "model.safetensors")
    names = sorted(tensors)
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    placed = {name: files[i % 2] for i, name in enumerate(names)}
    for file in files:
        held = {name: tensors[name] for name in names if placed[name] == file}
        save_file(held, parts / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": placed}
    (parts / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a dataset."""
    data = write_rows(tmp_path_factory.mktemp("rows") / "train.jsonl").read_bytes()
    return {"data/train.jsonl": data, "README.md": b"---\nlicense: mit\n---\n"}


@pytest.fixture
def site(tmp_path: Path, base: dict[str, bytes], rows: dict[str, bytes]) -> Iterator[Site]:
    hub = Hub({"models/org/tiny": Repository(base), "datasets/org/rows": Repository(rows)})
    with serving(hub):
        yield Site(tmp_path, hub)


def test_what_was_fetched_is_all_that_a_run_needs(site: Site) -> None:
    config = site.config()
    site.hub.break_after = 50_000
    done = site.fetch(config)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "org/tiny" in done.stdout
    assert "org/rows" in done.stdout
    assert "The cache holds all that the run needs" in done.stdout
    assert not (set(OTHER_FORMS) - {"README.md"}) & set(site.hub.downloads)
    twice = [name for name, times in Counter(site.hub.downloads).items() if times == 2]
    assert len(twice) == 1, "the one download that broke was taken up again"
    assert not (site.directory / "runs").exists(), "nothing of the run is made"

    sent = list(site.hub.downloads)
    again = site.fetch(config)
    assert again.returncode == 0, again.stdout + again.stderr
    assert site.hub.downloads == sent, "nothing is sent twice"

    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(site.cache), "HF_ENDPOINT": "http://[::1]:1"}
    trained = medtrain("run", config, "--until", "sft", cwd=None, **offline)
    assert trained.returncode == 0, trained.stdout + trained.stderr


def test_without_the_hub_the_revision_is_found_that_was_fetched_last(
    site: Site, rows: dict[str, bytes]
) -> None:
    config = site.config(model={"base": "builtin:tiny"})
    newer = {**rows, "data/train.jsonl": rows["data/train.jsonl"] * 2}
    old, new = site.hub.repositories["datasets/org/rows"], Repository(newer, commit="d" * 40)
    for repository in (old, new, old):
        site.hub.repositories["datasets/org/rows"] = repository
        done = site.fetch(config)
        assert done.returncode == 0, done.stdout + done.stderr
        assert repository.commit[:12] in done.stdout


def test_everything_that_is_refused_is_said_at_once(site: Site) -> None:
    site.hub.repositories["models/org/tiny"].gated = True
    site.hub.repositories["models/org/bare"] = Repository({"config.json": b"{}"})
    variants = ["base", {"name": "a", "path": "org/absent"}, {"name": "b", "path": "org/bare"}]
    config = site.config(evaluate={"variants": variants})
    failed = site.fetch(config)
    said = failed.stdout + failed.stderr
    assert failed.returncode == 69
    assert "org/tiny (model.base) is gated" in said
    assert "accept its terms on the hub (https://huggingface.co/org/tiny)" in said
    assert "export HF_TOKEN" in said
    assert "org/absent (evaluate.variants, a): status 401" in said
    assert "org/bare (evaluate.variants, b) has no safetensors weights" in said
    assert "org/rows" in failed.stdout, "what can be had is fetched"
    assert "Traceback" not in said


def test_the_token_comes_from_the_environment_and_is_not_shown(site: Site) -> None:
    (site.cache).mkdir()
    (site.cache / "token").write_text("hf_somebodyElse")
    site.hub.repositories["models/org/tiny"].gated = True
    config = site.config(data={"sources": [{"adapter": "table", "path": "builtin:questions"}]})
    assert site.fetch(config).returncode == 69
    assert site.hub.tokens == set(), "not whoever logged in to a shared cache"
    done = site.fetch(config, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stdout + done.stderr
    assert site.hub.tokens == {f"Bearer {TOKEN}"}
    assert TOKEN not in done.stdout + done.stderr


def test_a_hub_out_of_reach(site: Site) -> None:
    failed = site.fetch(site.config(), HF_ENDPOINT="http://127.0.0.1:9", HF_TOKEN=TOKEN)
    said = failed.stdout + failed.stderr
    assert failed.returncode == 69, said
    assert "The hub cannot be reached for org/tiny (model.base)" in said
    assert "login node" in said
    assert TOKEN not in said


def test_a_hub_that_is_switched_off(site: Site) -> None:
    failed = site.fetch(site.config(), HF_HUB_OFFLINE="1")
    assert failed.returncode == 69
    assert "HF_HUB_OFFLINE is set" in failed.stdout + failed.stderr
    assert "unset HF_HUB_OFFLINE" in failed.stdout + failed.stderr


def test_an_encoder_that_is_named_by_its_id(site: Site) -> None:
    config = site.config(
        model={"base": "builtin:tiny"},
        data={"sources": [{"adapter": "table", "path": "builtin:questions"}]},
        evaluate={"bertscore_model": "org/tiny"},
    )
    failed = site.fetch(config)
    assert failed.returncode == 65, failed.stdout + failed.stderr
    place = site.cache / "hub" / "models--org--tiny" / "snapshots" / ("c" * 40)
    assert f"set evaluate.bertscore_model={place}" in failed.stdout + failed.stderr
    assert (place / "config.json").is_file()


def test_a_run_that_takes_nothing_from_the_hub(tmp_path: Path) -> None:
    done = medtrain("prepare", "configs/quickstart.yaml", f"output_dir={tmp_path}", "--fetch")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Nothing of this run comes from the hub" in done.stdout
    assert list(tmp_path.iterdir()) == []


# What is needed


def config_of(**sections: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "name": "run",
        "model": {"base": "org/base", "revision": "v2"},
        "data": {"sources": [{"adapter": "table", "path": "org/rows"}]},
    }
    return parse_config({**tree, **sections})


def test_models_are_named_once_with_what_is_needed_of_them(tmp_path: Path) -> None:
    config = config_of(
        judge={"kind": "model", "model": "org/judge"},
        evaluate={
            "variants": [
                "base",
                {"name": "same", "path": "org/base", "revision": "v2"},
                {"name": "other", "path": "org/other"},
                {"name": "here", "path": str(tmp_path)},
            ],
            "engine": "openai",
            "base_url": "http://127.0.0.1:8000/v1",
        },
    )
    needs = {need.name: need for need in models_needed(config)}
    assert list(needs) == ["org/base", "org/other", "org/judge"]
    assert needs["org/base"].revision == "v2"
    assert needs["org/base"].weights
    assert not needs["org/other"].weights, "an endpoint answers; its tokenizer is used here"
    assert needs["org/judge"].weights


def test_the_judge_at_an_endpoint_is_no_model_of_the_hub() -> None:
    assert [need.name for need in models_needed(config_of())] == ["org/base"]


def test_local_and_built_in_data_are_left_out(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    sources = [
        {"adapter": "table", "path": "builtin:questions"},
        {"adapter": "table", "path": str(rows)},
        {"adapter": "table", "path": ["org/one", "org/two"], "subset": "labelled"},
    ]
    needs = datasets_needed(config_of(data={"sources": sources}))
    assert [(need.name, need.why) for need in needs] == [
        ("org/one", "data.sources.2"), ("org/two", "data.sources.2"),
    ]  # fmt: skip
    assert needs[0].source.subset == "labelled"


def test_a_directory_that_is_not_there_is_no_hub_id() -> None:
    with pytest.raises(DataError, match=r"model\.base: there is no directory \./base"):
        models_needed(config_of(model={"base": "./base"}))


def test_sizes_are_for_people() -> None:
    assert [size(n) for n in (0, 999, 15_000, 2_500_000, 16_100_000_000)] == [
        "0 B", "999 B", "15.0 kB", "2.5 MB", "16.1 GB",
    ]  # fmt: skip
