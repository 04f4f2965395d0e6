"""`cluster:` and the site's file: which layer wins, what Slurm is asked for, what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from medtrain.cluster.site import (
    batch_python,
    job_environment,
    job_python,
    resources_of,
    sbatch_options,
    setup_lines,
    total_gpus,
)
from medtrain.config import JobKind, RunConfig, dump_config, load_config, parse_config
from medtrain.errors import ConfigError

KINDS = get_args(JobKind)
GPU_KINDS = ("sft", "merge", "generate", "reference", "dpo", "evaluate")


def config_of(cluster: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    return parse_config(
        {
            "name": "r",
            "model": {"base": "someone/some-model"},
            "data": {"sources": [{"adapter": "table", "path": "rows.jsonl"}]},
            "cluster": cluster or {},
            **sections,
        }
    )


def write(path: Path, tree: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


LAYER = st.fixed_dictionaries(
    {},
    optional={
        "cpus": st.integers(1, 64),
        "gpus": st.integers(0, 8),
        "time_min": st.integers(3, 9999),
        "partition": st.sampled_from(["a", "b"]),
        "sbatch": st.dictionaries(
            st.sampled_from(["mail-type", "nice"]), st.integers(1, 9), max_size=2
        ),
    },
)


@given(above=LAYER, own=LAYER, kind=st.sampled_from(KINDS))
def test_the_layer_nearest_to_the_job_wins(
    above: dict[str, Any], own: dict[str, Any], kind: JobKind
) -> None:
    wanted = resources_of(config_of({**above, "stages": {kind: own}}), kind)
    for name in ("cpus", "time_min", "partition"):
        given_ = own.get(name, above.get(name))
        assert getattr(wanted, name) == given_ or given_ is None
    assert wanted.sbatch == {**above.get("sbatch", {}), **own.get("sbatch", {})}
    shared = min(above.get("gpus", 1), 1) if kind == "reference" else above.get("gpus", 1)
    usable = own.get("gpus", shared if kind in GPU_KINDS else 0)
    assert wanted.gpus == usable


def test_only_what_can_use_a_gpu_asks_for_one() -> None:
    config = config_of({"gpus": 4, "gpu_type": "a100", "nodes": 2})
    assert {k: total_gpus(config, k) for k in KINDS} == {
        "cpu": 0, "sft": 8, "merge": 4, "generate": 4, "judge": 0, "reference": 1, "dpo": 8,
        "evaluate": 4,
    }  # fmt: skip
    assert sbatch_options(config, "sft")["gpus-per-node"] == "a100:4"
    assert sbatch_options(config, "sft")["nodes"] == 2
    assert sbatch_options(config, "generate")["nodes"] == 1
    for kind in ("cpu", "judge"):
        assert "gpus-per-node" not in sbatch_options(config, kind)


@pytest.mark.parametrize(
    ("sections", "with_gpu"),
    [
        ({"judge": {"kind": "model", "model": "some/judge"}}, {"judge"}),
        ({"generate": {"engine": "openai", "base_url": "http://x/v1"}}, set()),
    ],
    ids=["a judge that runs here", "answers from an endpoint"],
)
def test_where_the_model_runs_decides(sections: dict[str, Any], with_gpu: set[str]) -> None:
    config = config_of(**sections)
    asks = {k for k in KINDS if total_gpus(config, k)}
    unchanged = {"sft", "merge", "reference", "dpo", "evaluate"}
    assert asks - unchanged - with_gpu <= {"generate"} - sections.keys()
    assert with_gpu | unchanged <= asks


def test_the_built_in_base_needs_no_gpu_unless_a_stage_asks() -> None:
    config = config_of({"stages": {"sft": {"gpus": 2}}}, model={"base": "builtin:tiny"})
    assert {k for k in KINDS if total_gpus(config, k)} == {"sft"}


def test_what_is_not_set_is_not_asked_for() -> None:
    assert sbatch_options(config_of(), "cpu") == {
        "nodes": 1, "ntasks-per-node": 1, "cpus-per-task": 4, "time": 240, "requeue": True,
    }  # fmt: skip


def test_every_option() -> None:
    config = config_of(
        {
            "account": "a", "partition": "p", "qos": "q", "constraint": "c", "reservation": "r",
            "exclude": "n[1-2]", "gpus": 2, "cpus": 3, "mem_gb": 1.5, "time_min": 9,
            "sbatch": {"mail-type": "FAIL", "exclusive": True, "requeue-nope": False},
        }
    )  # fmt: skip
    assert sbatch_options(config, "sft") == {
        "account": "a", "partition": "p", "qos": "q", "constraint": "c", "reservation": "r",
        "exclude": "n[1-2]", "nodes": 1, "ntasks-per-node": 1, "gpus-per-node": "2",
        "cpus-per-task": 3, "mem": "1536M", "time": 9, "requeue": True, "mail-type": "FAIL",
        "exclusive": True, "requeue-nope": False,
    }  # fmt: skip


def test_setup_lines_survive_any_value(tmp_path: Path) -> None:
    """The shell that reads them sees the values that were written."""
    values = {"QUOTED": 'it\'s "so"', "SPACED": "a  b", "DOLLAR": "$HOME `id`", "LINES": "a\nb"}
    config = config_of({"environment": values, "setup": ["FROM_SETUP=yes"], "hf_home": "/a b"})
    shown = "; ".join(f'printf "%s\\0" "${name}"' for name in (*values, "FROM_SETUP", "HF_HOME"))
    script = "\n".join([*setup_lines(config), shown])
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split("\0")[:-1] == [*values.values(), "yes", "/a b"]


def test_a_setup_line_that_fails_ends_the_job() -> None:
    script = "\n".join([*setup_lines(config_of({"setup": ["false"]})), "echo went on"])
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "went on" not in done.stdout


def test_jobs_are_offline_unless_told_otherwise() -> None:
    assert job_environment(config_of())["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in job_environment(config_of({"offline": False}))


def test_which_python() -> None:
    assert job_python(config_of()) == sys.executable == batch_python(config_of())
    elsewhere = config_of({"python": "/shared/my env/bin/python"})
    assert job_python(elsewhere) == "'/shared/my env/bin/python'"
    assert batch_python(elsewhere) == "/shared/my env/bin/python"


@pytest.mark.parametrize(
    "container",
    [{"container": "apptainer exec x.sif"}, {"srun": ["--container-image=x.sqsh"]}],
    ids=["prefix", "srun"],
)
def test_what_calls_srun_stays_outside_of_a_container(container: dict[str, Any]) -> None:
    config = config_of({**container, "python": "/inside/python3"})
    assert job_python(config).endswith("/inside/python3")
    assert batch_python(config) == sys.executable


# The site's file


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    tree = {
        "model": {"base": "builtin:tiny"},
        "data": {"sources": [{"adapter": "table", "path": "rows.jsonl"}]},
        "cluster": {"account": "mine", "stages": {"sft": {"nodes": 2}}},
    }
    return write(tmp_path / "run.yaml", tree)


SITE = {"account": "theirs", "partition": "gpu", "stages": {"sft": {"cpus": 16, "nodes": 1}}}


def test_the_run_is_laid_over_its_site(
    tmp_path: Path, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = write(tmp_path / "site.yaml", SITE)
    monkeypatch.setenv("MEDTRAIN_SITE", str(named))
    cluster = load_config(config_file).cluster
    assert (cluster.account, cluster.partition, cluster.site) == ("mine", "gpu", str(named))
    assert (cluster.stages["sft"].cpus, cluster.stages["sft"].nodes) == (16, 2)
    monkeypatch.delenv("MEDTRAIN_SITE")
    assert load_config(config_file).cluster.partition is None
    assert load_config(config_file, [f"cluster.site={named}"]).cluster.partition == "gpu"


def test_the_site_of_the_working_directory(
    tmp_path: Path, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slurm").mkdir()
    write(tmp_path / "slurm" / "site.yaml", SITE)
    monkeypatch.chdir(tmp_path)
    assert load_config(config_file).cluster.partition == "gpu"


def test_a_site_that_changes_changes_no_run_that_has_begun(
    tmp_path: Path, config_file: Path
) -> None:
    """A run's own configuration holds the site's values; later changes are for later runs."""
    named = write(tmp_path / "site.yaml", SITE)
    resolved = load_config(config_file, [f"cluster.site={named}"])
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(dump_config(resolved))
    (run / "stages").mkdir()
    write(named, {**SITE, "partition": "other", "gpus": 8, "sbatch": {"nice": 5}})
    assert load_config(run).cluster == resolved.cluster
    named.unlink()
    assert load_config(run).cluster == resolved.cluster


def test_all_problems_at_once(tmp_path: Path, config_file: Path) -> None:
    site = {
        "acount": "x",
        "gpus": -1,
        "time_min": "soon",
        "stages": {"finetune": {"gpus": 1}},
        "environment": {"OPENAI_API_KEY": "sk-planted-1234567890", "HF_TOKEN": "hf_planted"},
    }
    named = write(tmp_path / "site.yaml", site)
    with pytest.raises(ConfigError) as caught:
        load_config(config_file, [f"cluster.site={named}"])
    said = str(caught.value)
    for part in ("5 problems", "cluster.acount", "'account'", "cluster.gpus", "cluster.time_min",
                 "finetune", "OPENAI_API_KEY", "HF_TOKEN", "secrets_file"):  # fmt: skip
        assert part in said
    assert "planted" not in said


@pytest.mark.parametrize("name", ["array", "comment", "dependency", "job-name", "output", "wrap"])
def test_options_that_are_medtrains_own(name: str) -> None:
    for cluster in ({"sbatch": {name: "x"}}, {"stages": {"judge": {"sbatch": {name: "x"}}}}):
        with pytest.raises(ConfigError, match=f"{name} is set by medtrain"):
            config_of(cluster)


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "my_token", "DB_PASSWORD", "aws_secret_id"])
def test_secrets_are_refused_without_being_shown(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of({"environment": {name: "planted-value"}})
    assert name in str(caught.value)
    assert "secrets_file" in str(caught.value)
    assert "planted-value" not in str(caught.value)


@pytest.mark.parametrize("key", ["setup", "srun"])
def test_a_secret_in_a_shell_line_is_refused_without_being_shown(key: str) -> None:
    with pytest.raises(ConfigError, match="sets a secret") as refused:
        config_of({key: ["export HF_TOKEN=hf_planted"]})
    assert "planted" not in str(refused.value)
    config_of({"environment": {"TOKENIZERS_PARALLELISM": "false"}})
    config_of({key: ["export HF_TOKEN=$(cat ~/.token)", "export TOKENIZERS_PARALLELISM=false"]})
