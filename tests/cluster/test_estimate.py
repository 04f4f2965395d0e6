"""`medtrain plan`: what would run, how long it is likely to take, and where that comes from."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medtrain.cluster.plan import PlannedJob, RunPlan, make_plan
from medtrain.cluster.workload import duration, words
from medtrain.config import Resources, RunConfig, parse_config
from medtrain.console import Console
from medtrain.gpus import DEFAULT_GPU, gpu_named, gpu_of, parameters_of
from medtrain.run import Run
from medtrain.selection import Selection
from medtrain.stages import by_name
from tests.cluster.scene import Scene
from tests.small_run import medtrain, write_config

LLAMA: dict[str, Any] = {
    "name": "llama",
    "model": {"base": "meta-llama/Meta-Llama-3-8B", "dtype": "bfloat16"},
    "data": {
        "max_rows": 5000,
        "preference_prompts_from": "train",
        "max_preference_prompts": 1000,
        "max_eval_rows": 200,
        "sources": [{"adapter": "medical-qa", "path": "org/questions"}],
    },
    "cluster": {"gpu_type": "a100"},
}


LLAMA_8B = 8_030_261_248
"""Its parameters."""


def config_of(**sections: Any) -> RunConfig:
    """The Llama run, some sections laid over."""
    return parse_config({**LLAMA, **{k: {**LLAMA.get(k, {}), **v} for k, v in sections.items()}})


def plan_of(config: RunConfig, root: Path = Path("no-such-run"), **chosen: Any) -> RunPlan:
    return make_plan(Run(root), config, Selection(**chosen), "llama.yaml")


def job_of(plan: RunPlan, key: str) -> PlannedJob:
    return next(job for job in plan.jobs if job.key == key)


def test_the_jobs_are_those_of_the_chain_in_its_order() -> None:
    keys = [job.key for job in plan_of(config_of()).jobs]
    assert keys == [
        "prepare", "sft", "merge-sft", "generate.candidates", "generate.candidates.close",
        "judge.verdicts", "judge.verdicts.close", "reference.sums", "reference.sums.close", "dpo",
        "merge-dpo", "evaluate.answers", "evaluate.answers.close", "evaluate.verdicts",
        "evaluate.verdicts.close",
    ]  # fmt: skip


def compute_s(plan: RunPlan, key: str) -> float:
    """Seconds of a job without loading."""
    job = job_of(plan, key)
    assert job.task_s is not None
    return job.task_s - job.load_s


@pytest.mark.parametrize(("checkpointing", "passes"), [(False, 4), (True, 6)])
def test_training_costs_no_gradient_of_frozen_weights(checkpointing: bool, passes: int) -> None:
    plan = plan_of(config_of(sft={"activation_checkpointing": checkpointing}))
    tokens = 4500 * 0.95 * 512  # rows without evaluation and validation, half of max_length
    seconds = passes * LLAMA_8B * tokens / (312e12 * 0.3)
    assert compute_s(plan, "sft") == pytest.approx(seconds, rel=0.01)
    sft = job_of(plan, "sft")
    assert sft.basis == "estimated"
    assert sft.task_s is not None
    assert sft.gpu_hours == pytest.approx(sft.task_s / 3600)


def test_the_reference_reads_every_pair_once_and_dpo_does_not_read_it_again() -> None:
    dpo = {"validation_fraction": 0, "epochs": 1, "activation_checkpointing": False}
    plan = plan_of(config_of(dpo=dpo))
    pairs = 1000 * 2 * 512
    forward = 2 * LLAMA_8B * pairs / (312e12 * 0.3)
    assert compute_s(plan, "reference.sums") == pytest.approx(forward, rel=0.01)
    assert compute_s(plan, "dpo") == pytest.approx(2 * forward, rel=0.01)
    twice = plan_of(config_of(dpo={**dpo, "epochs": 2}))
    assert compute_s(twice, "reference.sums") == pytest.approx(forward, rel=0.01)
    assert compute_s(twice, "dpo") == pytest.approx(4 * forward, rel=0.01)


@given(nodes=st.integers(1, 8), gpus=st.integers(1, 8), rows=st.integers(100, 10**7))
def test_more_gpus_take_less_time_and_no_fewer_gpu_hours(nodes: int, gpus: int, rows: int) -> None:
    stages = {"sft": {"nodes": nodes, "gpus": gpus}}
    one = job_of(plan_of(config_of(data={"max_rows": rows})), "sft")
    config = config_of(data={"max_rows": rows}, cluster={"stages": stages})
    many = job_of(plan_of(config), "sft")
    assert one.task_s is not None
    assert many.task_s is not None
    assert many.task_s <= one.task_s * 1.0001
    assert many.gpu_hours is not None
    assert one.gpu_hours is not None
    assert many.gpu_hours >= one.gpu_hours * 0.9999


@given(fewer=st.integers(1, 10**6), more=st.integers(0, 10**6))
def test_more_rows_never_take_less(fewer: int, more: int) -> None:
    def hours(rows: int) -> float:
        data = {"max_preference_prompts": rows, "max_rows": 10**8, "max_eval_rows": rows}
        return plan_of(config_of(data=data)).gpu_hours

    assert hours(fewer + more) >= hours(fewer) * 0.9999


def test_decoding_is_bound_by_memory_bandwidth() -> None:
    job = job_of(plan_of(config_of(generate={"batch_size": 16})), "generate.candidates")
    a_step = 2 * LLAMA_8B / (1.555e12 * 0.4)
    decoding = 63 * 256 * a_step  # 1000 prompts in batches of 16, 256 tokens
    reading = 2 * LLAMA_8B * 1000 * 256 / (312e12 * 0.3)
    assert job.task_s is not None
    assert job.task_s - job.load_s == pytest.approx(decoding + reading, rel=0.01)


@pytest.mark.parametrize("gpu", ["a100", "a100-80gb", "h100", "l40s"])
def test_as_many_answers_as_fit_the_card_take_less_time_than_sixteen_prompts(gpu: str) -> None:
    def seconds(**generate: Any) -> float:
        config = config_of(cluster={"gpu_type": gpu}, generate=generate)
        job = job_of(plan_of(config), "generate.candidates")
        assert job.task_s is not None
        return job.task_s - job.load_s

    assert seconds() < seconds(batch_size=16)
    assert seconds(decoding="batches") == seconds(batch_size=16)


def test_shards_share_the_work_and_load_the_model_each() -> None:
    one = job_of(plan_of(config_of()), "generate.candidates")
    four = job_of(plan_of(config_of(generate={"num_shards": 4})), "generate.candidates")
    assert four.tasks == 4
    assert one.task_s is not None
    assert four.task_s is not None
    assert four.task_s - four.load_s == pytest.approx((one.task_s - one.load_s) / 4)
    assert four.gpu_hours is not None
    assert one.gpu_hours is not None
    assert four.gpu_hours > one.gpu_hours


def test_a_judge_at_an_endpoint_costs_calls_and_tokens() -> None:
    plan = plan_of(config_of(judge={"kind": "openai"}))
    pairs, evaluated = job_of(plan, "judge.verdicts"), job_of(plan, "evaluate.verdicts")
    assert "2 k calls" in pairs.note  # 1000 pairs in both orders
    assert "2.4 k calls" in evaluated.note  # 200 rows: 3 + 3 answers, and 3 pairs twice
    assert "tokens" in pairs.note
    assert pairs.gpu_hours == evaluated.gpu_hours == 0


def test_a_judge_that_is_loaded_costs_gpu_hours() -> None:
    plan = plan_of(config_of(judge={"kind": "model", "model": "Qwen/Qwen2.5-7B-Instruct"}))
    judged = job_of(plan, "judge.verdicts")
    assert judged.gpus == 1
    assert judged.gpu_hours


def test_what_nobody_can_know_is_a_question_mark() -> None:
    config = config_of(data={"max_rows": None})
    plan = plan_of(config)
    assert job_of(plan, "sft").gpu_hours is None
    assert plan.unknown == ["sft"]
    assert "unknown number for sft" in shown(plan)
    assert job_of(plan, "generate.candidates").gpu_hours  # a limit of its own bounds it
    steps = plan_of(config_of(data={"max_rows": None}, sft={"max_steps": 100}))
    assert job_of(steps, "sft").gpu_hours


def test_a_run_without_gpus_has_no_gpu_hours() -> None:
    plan = plan_of(config_of(model={"base": "builtin:tiny"}, judge={"kind": "rules"}))
    assert plan.gpu_hours == 0
    assert "no GPUs" in shown(plan)
    assert plan.commands == ("medtrain prepare llama.yaml --fetch", "medtrain submit llama.yaml")


def test_nothing_is_touched(tmp_path: Path) -> None:
    plan_of(config_of(), tmp_path / "runs" / "llama")
    assert list(tmp_path.iterdir()) == []


# What was measured


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(tmp_path, monkeypatch)


def scene_plan(scene: Scene, **chosen: Any) -> RunPlan:
    return make_plan(scene.run, scene.config, Selection(**chosen), "small.yaml")


def test_what_is_done_is_shown_with_its_seconds(scene: Scene) -> None:
    scene.finish_until("merge-sft")
    plan = scene_plan(scene)
    done = [job for job in plan.jobs if job.state == "done"]
    assert [job.key for job in done] == ["prepare", "sft", "merge-sft"]
    assert done[1].task_s == 60.0
    assert plan.to_do[0].key == "generate.candidates.open"
    assert "60 s" in shown(plan)


def test_a_finished_run_would_queue_nothing(scene: Scene) -> None:
    scene.finish_until("report")
    plan = scene_plan(scene)
    assert plan.to_do == []
    assert plan.commands == ()
    assert "nothing would be queued" in shown(plan)


def test_shards_that_were_measured_tell_of_those_to_come(scene: Scene) -> None:
    finish_prepare(scene, rows=40, tokens=4000)
    scene.finish("sft", "merge-sft")
    estimated = job_of(scene_plan(scene, only="evaluate"), "evaluate.answers")
    assert estimated.basis == "unknown"  # nothing tells how large the base is
    scene.compute("generate", "candidates", range(4))
    measured = job_of(scene_plan(scene, only="evaluate"), "evaluate.answers")
    assert measured.basis == "measured"
    assert measured.task_s is not None
    assert "measured" in shown(scene_plan(scene, only="evaluate"))


def test_prepared_data_are_counted_and_not_guessed(scene: Scene) -> None:
    assert "limits allow" in scene_plan(scene).assumptions[0]
    finish_prepare(scene, rows=40, tokens=4000)
    plan = scene_plan(scene)
    assert "data card" in plan.assumptions[0]
    assert "100 tokens a training row" in plan.assumptions[0]
    assert "80 answers" in job_of(plan, "generate.candidates").note


def test_a_training_that_was_done_before_tells_how_long_it_takes(scene: Scene) -> None:
    scene.finish("prepare", "sft", seconds=5000.0)
    changed = scene.config.model_copy(
        update={"sft": scene.config.sft.model_copy(update={"learning_rate": 1e-4})}
    )
    job = job_of(make_plan(scene.run, changed, Selection(only="sft"), "small.yaml"), "sft")
    assert (job.state, job.basis) == ("to do", "measured")
    assert job.task_s is not None
    assert job.task_s >= 5000


def test_what_must_come_before_is_said(scene: Scene) -> None:
    plan = scene_plan(scene, start="generate", until="judge")
    assert plan.commands == (
        "medtrain submit small.yaml --until merge-sft",
        "medtrain submit small.yaml --from generate --until judge",
    )


def finish_prepare(scene: Scene, *, rows: int, tokens: int, **lengths: Any) -> None:
    """Data that are prepared, with a card that counts them."""
    scene.finish("prepare")
    splits = {"train": rows, "preference_prompts": rows, "ready_preferences": 0, "eval": rows}
    counted = {"train": {"total": tokens, "supervised": tokens // 2, **lengths}}
    scene.run.data_card.write_text(json.dumps({"splits": splits, "tokens": counted}))
    stage = by_name("prepare")
    outputs = stage.writes(scene.run, scene.config)
    fingerprint = scene.pipeline.fingerprint(stage)
    scene.pipeline.lineage.finish("prepare", fingerprint, outputs, {}, 60.0, "now")


# What is out of proportion


def warned(**sections: Any) -> str:
    return "\n".join(plan_of(config_of(**sections)).warnings)


def test_a_time_limit_that_is_too_short() -> None:
    said = warned(cluster={"stages": {"sft": {"time_min": 10}}})
    assert "sft: a task takes about 20 min and its time limit is 10 min" in said
    assert "requeued 2 times" in said
    assert "cluster.stages.sft.time_min" in said
    assert "cluster.max_requeues=1 allows" in warned(
        cluster={"stages": {"sft": {"time_min": 10}}, "max_requeues": 1}
    )


def test_so_many_shards_that_they_do_little_but_load() -> None:
    said = warned(generate={"num_shards": 500, "batch_size": 16})
    assert "generate.candidates: loading the model" in said
    assert "generate.num_shards=2" in said


def test_so_few_shards_that_one_takes_days() -> None:
    data = {"max_preference_prompts": 200_000, "max_rows": 10**7}
    said = warned(data=data, generate={"batch_size": 16})
    assert "generate.candidates: a task takes about" in said
    assert "generate.num_shards=" in said


def test_a_plan_in_proportion_warns_of_nothing() -> None:
    assert warned() == ""


# Sizes and speeds


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("meta-llama/Meta-Llama-3-8B", 8e9),
        ("meta-llama/Llama-2-13b-hf", 13e9),
        ("HuggingFaceH4/zephyr-7b-beta", 7e9),
        ("meta-llama/Llama-3.1-70B-Instruct", 70e9),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", 1.1e9),
        ("HuggingFaceTB/SmolLM2-135M", 135e6),
        ("mistralai/Mixtral-8x7B-v0.1", None),
        ("unsloth/llama-4bit", None),
        ("openai-community/gpt2", None),
    ],
)
def test_a_name_tells_the_parameters(name: str, parameters: float | None) -> None:
    assert parameters_of(name) == parameters


def test_a_directory_tells_them_exactly(base_dir: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    with safe_open(base_dir / "model.safetensors", "np") as tensors:
        names = tensors.keys()
        shapes = [tensors.get_slice(name).get_shape() for name in names]
    expected = 0
    for shape in shapes:
        elements = 1
        for size in shape:
            elements *= size
        expected += elements
    assert parameters_of(str(base_dir)) == expected
    broken = tmp_path / "model-7B"
    broken.mkdir()
    (broken / "model.safetensors").write_bytes(b"\xff" * 20)
    assert parameters_of(str(broken)) == 7e9


@pytest.mark.parametrize(
    ("wanted", "name"),
    [
        ({"gpu_type": "NVIDIA_H100_80GB"}, "H100 SXM"),
        ({"constraint": "v100-32g&ib"}, "V100 SXM2 32 GB"),
        ({"gpu_type": "v100"}, "V100 SXM2 16 GB"),
        ({"gpu_type": "tesla_v100-sxm2-32gb"}, "V100 SXM2 32 GB"),
        ({"gpu_type": "a100"}, "A100 40 GB"),
        ({"gpu_type": "a100-pcie-40gb"}, "A100 40 GB"),
        ({"gpu_type": "a100-80gb"}, "A100 80 GB"),
        ({"gpu_type": "a100_80g"}, "A100 80 GB"),
        ({"gpu_type": "A100-SXM4-80GB"}, "A100 80 GB"),
        ({"partition": "gpu-l40s"}, "L40S"),
        ({"gpu_type": "l4"}, "L4"),
        ({"gpu_type": "tesla-t4"}, "T4"),
        ({"gpu_type": "nvidia_a10g"}, "A10"),
        ({"gpu_type": "rtx_a6000"}, "RTX A6000"),
        ({"gpu_type": "rtx4090"}, "RTX 4090"),
        ({"partition": "gpu"}, None),
        ({"partition": "volta4"}, None),
    ],
)
def test_the_gpu_is_the_one_that_is_asked_for(wanted: dict[str, Any], name: str | None) -> None:
    found = gpu_of(Resources(**wanted))
    assert (found and found.name) == name


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("Tesla V100-SXM2-32GB", "V100 SXM2 32 GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80 GB"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("Quadro P6000", None),
    ],
)
def test_a_gpu_is_known_by_the_drivers_name(driver: str, name: str | None) -> None:
    found = gpu_named(driver)
    assert (found and found.name) == name


def test_without_a_name_a_gpu_is_assumed() -> None:
    plan = plan_of(config_of(cluster={"gpu_type": None}))
    assert f"{DEFAULT_GPU.name} where none is named" in plan.assumptions[1]
    assert all(stage.assumed for stage in plan.training)
    assert "which is assumed" in shown(plan)


@given(st.floats(1, 1e15))
def test_figures_have_two_digits(value: float) -> None:
    number, _, unit = words(value).partition(" ")
    scale = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[unit]
    assert float(number) * scale == pytest.approx(value, rel=0.051)
    assert len(number.replace(".", "").strip("0")) <= 2


def test_times_are_in_the_unit_that_fits() -> None:
    assert [duration(s) for s in (35, 90, 150, 3600, 12_345, 200_000)] == [
        "35 s", "90 s", "2.5 min", "1 h", "3.4 h", "2.3 d",
    ]  # fmt: skip


# The command


def test_the_command_as_json_imports_nothing_heavy(tmp_path: Path) -> None:
    config = write_config(tmp_path, tmp_path)
    code = (
        f"import sys; sys.argv = ['medtrain', 'plan', {str(config)!r}, '--json']\n"
        "from medtrain.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'datasets', 'submitit', 'huggingface_hub'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tree = json.loads(done.stdout)
    assert [job["job"] for job in tree["jobs"]][:2] == ["prepare", "sft"]
    assert set(tree["jobs"][1]) >= {"state", "tasks", "task_s", "gpu_hours", "basis"}
    assert set(tree["total"]) == {"jobs", "tasks", "gpu_hours", "unknown"}
    assert not (tmp_path / "runs").exists()


def test_the_command_shows_a_table(tmp_path: Path) -> None:
    done = medtrain("plan", write_config(tmp_path, tmp_path), "--until", "sft")
    assert done.returncode == 0, done.stderr
    assert "GPU-hours" in done.stdout
    assert "medtrain submit" in done.stdout
    assert "generate" not in done.stdout


def shown(plan: RunPlan, only: str = "") -> str:
    """As a person sees it; of one stage, if one is named."""
    if only:
        kept = tuple(one for one in plan.training if one.stage == only)
        plan = replace(plan, training=kept)
    console = Console()
    console.rich.width = 160
    with console.rich.capture() as captured:
        console.show(plan)
    return captured.get()
