"""Handing a job to Slurm: intent, files, sbatch, note; with an sbatch that only writes down."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from medtrain.cluster.chain import ChainJob, plan_chain, steps_of
from medtrain.cluster.dispatch import Dispatcher, dependency_of
from medtrain.cluster.tasks import ShardTask
from medtrain.config import RunConfig, load_config
from medtrain.errors import ConfigError, TryAgainError
from medtrain.run import Run
from medtrain.stages import STAGES
from tests.small_run import write_config

SBATCH = """#!/bin/bash
cd "{calls}"
n=$(ls | wc -l); mkdir "$n"
printf '%s\\n' "$@" > "$n/arguments"
env > "$n/environment"
{fails}
if [[ "$*" == *--parsable* ]]; then echo "$((100 + n));cluster"
else cp "${{!#}}" "$n/script"; echo "Submitted batch job $((100 + n))"; fi
"""


class FakeSbatch:
    """Takes every job, and remembers what it was given."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._program = directory / "bin" / "sbatch"
        self._calls = directory / "calls"
        self._program.parent.mkdir()
        self._calls.mkdir()
        # submitit asks for srun before it submits anything.
        for program in ("srun", "squeue", "scancel"):
            (directory / "bin" / program).write_text("#!/bin/sh\n")
            (directory / "bin" / program).chmod(0o755)
        monkeypatch.setenv("PATH", str(self._program.parent), prepend=":")
        self.answers()

    def answers(self, refusal: str = "") -> None:
        fails = f'echo "sbatch: error: {refusal}" >&2; exit 1' if refusal else ""
        self._program.write_text(SBATCH.format(calls=self._calls, fails=fails))
        self._program.chmod(0o755)

    def read(self, call: int, what: str) -> str:
        return (self._calls / str(call) / what).read_text()

    @property
    def count(self) -> int:
        return len(list(self._calls.iterdir()))


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSbatch:
    return FakeSbatch(tmp_path, monkeypatch)


DispatcherOf = Callable[..., Dispatcher]


@pytest.fixture
def dispatcher(tmp_path: Path) -> DispatcherOf:
    """Dispatchers of one run; its path has a space in it."""
    (tmp_path / "a place").mkdir()
    path = write_config(tmp_path / "a place", tmp_path)

    def of(*overrides: str, max_array_size: int = 1001) -> Dispatcher:
        config = load_config(path, ["generate.num_shards=5", *overrides])
        return Dispatcher(
            Run(Path(config.output_dir) / config.name), config, max_array_size=max_array_size
        )

    for_run = of().run
    for_run.create()
    return of


def job_of(config: RunConfig, key: str) -> ChainJob:
    return next(job for job in plan_chain(steps_of(STAGES, config), config) if job.key == key)


def directives(script: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", script, re.MULTILINE))


def test_an_array(sbatch: FakeSbatch, dispatcher: DispatcherOf) -> None:
    ours = dispatcher("cluster.parallelism=3")
    array = job_of(ours.config, "generate.candidates")
    done = ours.submit(array, {"merge-sft": ["7"]})
    assert (done.job_ids, done.starts, done.tasks) == (("100",), (0,), array.tasks)
    assert ours.ledger.all() == [done]
    asked = directives(sbatch.read(0, "script"))
    assert asked["array"] == "0-4%3"
    assert asked["dependency"] == "afterok:7"
    assert asked["kill-on-invalid-dep"] == "yes"
    assert asked["comment"].strip("'") == done.comment
    folder = ours.run.job_folder(done.key, 0)
    for index in range(5):
        carried = folder / f"100_{index}_submitted.pkl"
        assert carried.stat().st_size < 2_000, "a few words, no model and no rows"
        task = pickle.loads(carried.read_bytes()).function
        assert task == ShardTask(str(ours.run.root), "generate.candidates", 0, index)


def test_an_array_above_the_limit(sbatch: FakeSbatch, dispatcher: DispatcherOf) -> None:
    ours = dispatcher("cluster.parallelism=4", max_array_size=2)
    done = ours.submit(job_of(ours.config, "generate.candidates"), {})
    assert (done.job_ids, done.starts) == (("100", "101", "102"), (0, 2, 4))
    asked = [directives(sbatch.read(n, "script")).get("array") for n in range(3)]
    assert asked == ["0-1%1", "0-1%1", None], "together no more than the parallelism"
    assert [done.task_of("101", i) for i in range(2)] == [2, 3]
    folder = ours.run.job_folder(done.key, 0)
    # What ran as a plain job has no index in its name.
    names = [path.name for path in sorted(folder.glob("*_submitted.pkl"))]
    assert names == [f"{n}_submitted.pkl" for n in ("100_0", "100_1", "101_0", "101_1", "102")]
    assert pickle.loads((folder / names[-1]).read_bytes()).function.task == 4


def test_training(sbatch: FakeSbatch, dispatcher: DispatcherOf) -> None:
    ours = dispatcher("cluster.nodes=2", "cluster.modules=[cuda]", "cluster.stages.sft.gpus=3")
    done = ours.submit(job_of(ours.config, "sft"), {"prepare": ["5"]})
    assert (done.job_ids, done.gpus) == (("100",), 6), "of both nodes"
    arguments = sbatch.read(0, "arguments").splitlines()
    assert "--nodes=2" in arguments
    assert arguments[-5].endswith("slurm/train.sbatch")
    assert (arguments[-4], *arguments[-2:]) == ("--setup", "sft", str(ours.run.root))
    setup = Path(arguments[-3]).read_text()
    assert "module load cuda\n" in setup
    assert "export MEDTRAIN_PYTHON=" in setup


def test_sbatch_refuses(sbatch: FakeSbatch, dispatcher: DispatcherOf) -> None:
    """The error is sbatch's own words; the next try is a new submission."""
    ours = dispatcher()
    array = job_of(ours.config, "generate.candidates")
    for job in (job_of(ours.config, "sft"), array):
        sbatch.answers("Batch job submission failed: Invalid account nobody")
        with pytest.raises(ConfigError, match="Invalid account nobody") as caught:
            ours.submit(job, {})
        assert "Traceback" not in str(caught.value)
        failed = ours.ledger.latest()[job.key]
        assert ours.ledger.was_noted(failed)
        assert failed.job_ids == ()
        sbatch.answers()
        assert ours.submit(job, {}).number == 1


def test_somebody_else_submits_the_same(
    sbatch: FakeSbatch, dispatcher: DispatcherOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = dispatcher(), dispatcher()
    job = job_of(ours.config, "prepare")
    theirs.submit(job, {})
    monkeypatch.setattr(ours.ledger, "all", list)
    with pytest.raises(TryAgainError, match="prepare"):
        ours.submit(job, {})
    assert sbatch.count == 1


def test_a_job_tells_the_next_one_nothing_of_itself(
    sbatch: FakeSbatch, dispatcher: DispatcherOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repair is submitted from inside a job, whose limits must not become the next one's."""
    own = {"SLURM_JOB_ID": "1", "SLURM_CPUS_PER_TASK": "64", "SBATCH_PARTITION": "kept",
           "SUBMITIT_EXECUTOR": "slurm", "SLURM_CONF": "/etc/slurm.conf"}  # fmt: skip
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    ours = dispatcher()
    for key in ("generate.candidates", "sft"):
        ours.submit(job_of(ours.config, key), {})
    for call in range(2):
        told = set(re.findall(r"^(S\w+)=", sbatch.read(call, "environment"), re.MULTILINE))
        assert told & set(own) == {"SLURM_CONF", "SBATCH_PARTITION"}
    assert os.environ["SLURM_JOB_ID"] == "1"


def test_bad_nodes_are_added_to_those_of_the_configuration(
    sbatch: FakeSbatch, dispatcher: DispatcherOf
) -> None:
    ours = dispatcher("cluster.exclude='n[1-2]'")
    ours.submit(job_of(ours.config, "prepare"), {}, extra={"exclude": "n7,n9"})
    assert directives(sbatch.read(0, "script"))["exclude"].strip("'") == "n[1-2],n7,n9"


@pytest.mark.parametrize(
    ("after", "ids", "expected"),
    [
        ([("a", "afterok")], {"a": ["1"]}, "afterok:1"),
        ([("a", "afterany")], {"a": ["1", "2"]}, "afterany:1:2"),
        ([("a", "afterok"), ("b", "afterany")], {"a": ["1"], "b": ["2"]}, "afterok:1,afterany:2"),
        ([("a", "afterok")], {}, ""),
        ([], {"a": ["1"]}, ""),
    ],
)
def test_dependencies(
    after: Sequence[tuple[str, str]], ids: dict[str, list[str]], expected: str
) -> None:
    assert dependency_of(after, ids) == expected  # type: ignore[arg-type]


def test_what_a_kill_left_behind_blocks_no_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """submitit writes through one fixed temporary name, and fails where that exists."""
    from medtrain.cluster.tasks import _sweep_temporaries

    for name, value in {"SUBMITIT_FOLDER": str(tmp_path), "SUBMITIT_EXECUTOR": "slurm",
                        "SLURM_JOB_ID": "42", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
                        "SLURM_NODEID": "0", "SLURM_NTASKS": "1"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    left = [tmp_path / "42_0_result.pkl.save_tmp", tmp_path / "42_submitted.pkl.save_tmp"]
    kept = tmp_path / "43_submitted.pkl.save_tmp"
    for path in (*left, kept):
        path.write_bytes(b"half")
    _sweep_temporaries()
    assert [path.exists() for path in (*left, kept)] == [False, False, True]
