"""`medtrain plan`: whether a training fits its GPUs, and how long its rows are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medtrain.cluster.plan import RunPlan
from medtrain.cluster.training_plan import TrainingPlan
from medtrain.cluster.training_table import COLUMNS, figure
from medtrain.config import load_config
from medtrain.errors import ConfigError
from tests.cluster.scene import Scene
from tests.cluster.test_estimate import (
    LLAMA_8B,
    compute_s,
    config_of,
    finish_prepare,
    plan_of,
    scene_plan,
    shown,
)
from tests.small_run import medtrain

ROOT = Path(__file__).parents[2]


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(tmp_path, monkeypatch)


def training_of(plan: RunPlan, stage: str) -> TrainingPlan:
    return next(one for one in plan.training if one.stage == stage)


def test_a_training_shows_what_takes_how_much() -> None:
    plan = plan_of(config_of(cluster={"gpus": 4, "stages": {"sft": {"nodes": 2}}}))
    sft = training_of(plan, "sft")
    assert sft.choice.fits
    assert sft.load.rows_a_step == 8 * 4
    assert sft.load.steps == 134
    text = shown(plan, only="sft")
    for part in ("2 nodes × 4 × A100 40 GB", "8.03 G parameters", "134 steps of 32 rows",
                 "weights", "activations", "logits", "new tokens", "zero3-offload",
                 f"→ {sft.choice.strategy}"):  # fmt: skip
        assert part in text
    tree = plan.to_json()["training"][0]
    assert tree["parameters"]["total"] == LLAMA_8B
    assert [one["strategy"] for one in tree["strategies"]] == [
        "ddp", "zero2", "zero3", "zero3-offload",
    ]  # fmt: skip
    assert tree["strategies"][0]["weights"] < 6 * 2**30 < tree["gpu_bytes"]
    json.dumps(tree)


def test_what_does_not_fit_is_said_and_checked() -> None:
    small = config_of(cluster={"gpu_type": "t4"}, sft={"batch_size": 64})
    plan = plan_of(small)
    sft = training_of(plan, "sft")
    assert not sft.choice.fits
    assert "✗" in shown(plan)
    assert any("sft does not fit its GPUs (T4)" in line for line in plan.warnings)
    with pytest.raises(ConfigError, match=r"sft does not fit its GPUs \(T4\)") as caught:
        plan.check()
    assert "halve sft.batch_size (now 64)" in caught.value.fix
    assert all("submit" not in command for command in plan.commands)
    assert plan.commands[-1].endswith("--check")
    plan_of(config_of()).check()


def test_a_step_of_more_rows_than_there_are_is_warned_of(scene: Scene) -> None:
    finish_prepare(scene, rows=1000, tokens=300_000)
    assert not any("a step has" in line for line in scene_plan(scene).warnings)
    finish_prepare(scene, rows=4, tokens=1200)
    assert any("rows, and there are 4 to train on" in line for line in scene_plan(scene).warnings)


def test_fsdp2_does_not_fit_where_tokens_are_new() -> None:
    plan = plan_of(config_of(train={"strategy": "fsdp2"}, cluster={"gpus": 4}))
    assert all("new tokens" in stage.choice.reason for stage in plan.training)
    with pytest.raises(ConfigError, match="does not fit"):
        plan.check()


def test_a_stage_that_the_method_lacks_has_no_plan(tmp_path: Path) -> None:
    done = medtrain("plan", ROOT / "configs" / "quickstart.yaml", "dpo.method=orpo",
                    "--only", "reference", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 64
    assert "None of the chosen stages is part of this run" in done.stderr


def test_the_row_that_is_chosen_is_shown() -> None:
    plan = plan_of(config_of(train={"strategy": "zero3"}, cluster={"gpus": 1}))
    for stage in plan.training:
        assert stage.fitting is not None
        shown = [one.strategy for one in stage.fitting.estimates]
        assert stage.choice.strategy == "zero3"
        assert "zero3" in shown


@pytest.mark.parametrize("rows", [1, 4, 64])
@pytest.mark.parametrize("gpus", [1, 8])
def test_what_a_row_of_the_table_shows_adds_up(rows: int, gpus: int) -> None:
    plan = plan_of(config_of(cluster={"gpus": gpus}, sft={"batch_size": rows}))
    for stage in plan.training:
        assert stage.fitting is not None
        for one in stage.fitting.estimates:
            parts = [figure(one, part) for part in COLUMNS if part not in ("load", "peak")]
            assert min(parts) >= 0
            assert max(sum(parts), figure(one, "load")) == pytest.approx(one.peak)


def test_a_gpu_that_nobody_knows_is_said_and_checked() -> None:
    plan = plan_of(config_of(cluster={"gpu_type": "quantum"}))
    assert any("quantum is no GPU that medtrain knows" in line for line in plan.warnings)
    with pytest.raises(ConfigError, match="nobody can say whether sft fits") as caught:
        plan.check()
    assert "a100" in caught.value.fix


def test_where_the_base_is_unknown_nothing_is_claimed() -> None:
    plan = plan_of(config_of(model={"base": "someone/something"}))
    sft = training_of(plan, "sft")
    assert (sft.fitting, sft.choice.fits) == (None, True)
    assert "size of the base is not known" in shown(plan)
    plan.check()


def test_lengths_are_shown_once_they_are_counted(scene: Scene) -> None:
    assert training_of(scene_plan(scene), "sft").lengths is None
    finish_prepare(scene, rows=40, tokens=4000)
    assert training_of(scene_plan(scene), "sft").lengths is None, "a card without lengths"
    counted = {"mean": 100.0, "p95": 180, "max": 200,
               "histogram": {"width": 50, "rows": [2, 20, 0, 18]}}  # fmt: skip
    finish_prepare(scene, rows=40, tokens=4000, **counted)
    plan = scene_plan(scene)
    lengths = training_of(plan, "sft").lengths
    assert lengths is not None
    assert (lengths.p95, lengths.longest, sum(lengths.rows)) == (180, 200, 40)
    assert "1 ▂█ █ 200; mean 100, 95 % up to 180, longest 200" in shown(plan)


TWO_NODES = [
    "model.dtype=bfloat16",
    "cluster.gpu_type=a100",
    "cluster.stages.sft={nodes: 2, gpus: 4}",
    "cluster.stages.dpo={nodes: 2, gpus: 4}",
]
SHIPPED = [(path.name, []) for path in sorted((ROOT / "configs").glob("*.yaml"))]


@pytest.mark.parametrize(
    ("name", "overrides"), [*SHIPPED, ("llama3-8b-medqa.yaml", TWO_NODES)],
    ids=[*(name for name, _ in SHIPPED), "llama3-8b-medqa on 2 nodes"],
)  # fmt: skip
def test_every_shipped_config_fits_the_card_it_names(name: str, overrides: list[str]) -> None:
    config = load_config(ROOT / "configs" / name, overrides)
    plan = plan_of(config)
    plan.check()
    assert [one.stage for one in plan.training] == ["sft", "dpo"]
    for one in plan.training:
        assert not one.gpus or one.fitting is not None
        names_its_card = config.cluster.gpu_type is not None
        assert one.assumed is (bool(one.gpus) and not names_its_card)
    assert not any("bfloat16" in line for line in plan.warnings)


CARDS = {
    "llama3-8b-medqa.yaml": ("V100 SXM2 32 GB", 1),
    "llama2-13b-pubmedqa.yaml": ("A100 40 GB", 1),
    "llama3-70b-medqa.yaml": ("A100 80 GB", 8),
}


@pytest.mark.parametrize("name", CARDS)
def test_large_bases_name_the_cards_they_are_meant_for(name: str) -> None:
    for one in plan_of(load_config(ROOT / "configs" / name)).training:
        assert (one.gpu.name, one.nodes * one.gpus) == CARDS[name]
        assert one.choice.estimate is not None
        assert one.choice.estimate.peak <= one.gpu.memory_bytes


def test_the_header_of_llama_3_names_the_overrides_for_two_nodes() -> None:
    header = (ROOT / "configs" / "llama3-8b-medqa.yaml").read_text().partition("\nmodel:")[0]
    told = header.replace("'", "")
    for override in TWO_NODES:
        assert override in told


def test_a_gpu_without_bfloat16_computes_it_slowly() -> None:
    v100 = {"gpu_type": "v100-32gb"}
    whole = {"sft": {"activation_checkpointing": True}}
    fast = plan_of(config_of(cluster=v100, model={"dtype": "float16"}, **whole))
    slow = plan_of(config_of(cluster=v100, **whole))
    assert compute_s(slow, "sft") == pytest.approx(compute_s(fast, "sft") * 125 / 15.7, rel=0.01)
    assert any("no bfloat16" in line and "float16" in line for line in slow.warnings)
    assert not any("bfloat16" in line for line in fast.warnings)


def test_check_ends_with_the_code_of_a_wrong_configuration(tmp_path: Path) -> None:
    config = ROOT / "configs" / "llama3-8b-medqa.yaml"
    asked = ("plan", config, f"output_dir={tmp_path}", "--only", "sft")
    fits = medtrain(*asked, "--check")
    assert fits.returncode == 0, fits.stderr
    shown_only = medtrain(*asked, "cluster.gpu_type=t4", "sft.max_length=8192")
    assert shown_only.returncode == 0, shown_only.stderr
    checked = medtrain(*asked, "--check", "cluster.gpu_type=t4", "sft.max_length=8192")
    assert checked.returncode == 64
    assert "sft does not fit its GPUs (T4)" in checked.stderr


def test_every_stage_says_what_it_computes_with() -> None:
    config = config_of(cluster={"gpus": 1, "gpu_type": "h100"})
    text = " ".join(shown(plan_of(config)).split())
    assert text.count("attention: packed rows by varlen: PyTorch's variable-length flash") == 2
    computed = "computes in bfloat16, the base in 4 bits; adapters fused with the base layers; "
    assert text.count(f"{computed}optimizer adamw_torch_fused") == 2
    assert "merge: on the GPU (the base needs" in text
    assert "generate: answers decoded in slots, up to 128 rows at a time" in text
    assert "reference: packed rows by varlen: PyTorch's variable-length" in text
    assert "held-out loss: packed rows by varlen" in text
    older = config_of(
        cluster={"gpus": 1, "gpu_type": "v100"}, model={"dtype": "float16", "attention": "eager"},
        sft={"lora": {"dora": True}, "packing": False}, generate={"decoding": "batches"},
    )  # fmt: skip
    tree = plan_of(older).to_json()
    paths = tree["training"][0]["paths"]
    assert paths["attention"] == "padded rows (packing is off)"
    assert "PEFT's own path (sft.lora.dora" in paths["lora"]
    by_kind = {job["kind"]: job["path"] for job in tree["jobs"]}
    assert "padded rows (model.attention is eager)" in by_kind["reference"]
    assert by_kind["generate"] == "answers decoded 16 prompts at a time"
    assert by_kind["cpu"] is None


def test_a_model_that_answers_nowhere_is_warned_of() -> None:
    """It is trained in 4 bits, and answers in 16."""
    small = plan_of(config_of(cluster={"gpus": 1, "gpu_type": "t4"}, model={"dtype": "float16"}))
    assert any("generate does not fit: models answer unquantised" in w for w in small.warnings)
    assert any("evaluate does not fit" in w for w in small.warnings)
    large = plan_of(config_of(cluster={"gpus": 1, "gpu_type": "a100"}))
    assert not any("answer unquantised" in w for w in large.warnings)


def test_where_16_bits_would_fit_is_said() -> None:
    large = plan_of(config_of(cluster={"gpus": 1, "gpu_type": "h100"}))
    assert "The base would fit in 16 bits too" in shown(large)
    small = plan_of(config_of(cluster={"gpus": 1, "gpu_type": "a10"}))
    assert "would fit in 16 bits" not in shown(small)
    plain = config_of(cluster={"gpus": 1, "gpu_type": "h100"}, model={"quantization": "none"})
    assert "would fit in 16 bits" not in shown(plan_of(plain))
