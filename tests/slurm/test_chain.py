"""The quickstart through `medtrain submit`, shards and all, against `medtrain run`: equal, byte for
byte. On the way its SFT is told that time is over, and goes on in a second job."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from pathlib import Path
from typing import NamedTuple

import pytest

from medtrain.files import sha256_file, tree_files
from medtrain.run import Run
from medtrain.stages import STAGES
from tests.slurm.chain import Chain
from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
SHARDS = {"generate": 2, "judge": 2, "evaluate": 2}
SHARDED = (
    "generate/candidates.jsonl", "judge/verdicts.jsonl", "dpo/reference.jsonl",
    *(f"evaluate/{variant}/{what}.jsonl" for variant in ("base", "sft", "dpo")
      for what in ("answers", "loss")),
    *(f"evaluate/judge/{protocol}/verdicts.jsonl" for protocol in ("rubric", "rating", "pairwise")),
)  # fmt: skip


class Pair(NamedTuple):
    """The same configuration, submitted and run."""

    chain: Chain
    direct: Run


@pytest.fixture(scope="module")
def pair(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    directory = tmp_path_factory.mktemp("quickstart")
    name = f"quickstart-{uuid.uuid4().hex[:8]}"

    def placed(where: str) -> tuple[str, ...]:
        return f"output_dir={directory / where}", f"name={name}"

    jobs = ("cluster.cpus=1", "cluster.mem_gb=1.5", "cluster.time_min=30", "cluster.look_again_s=0")
    shards = tuple(f"{stage}.num_shards={number}" for stage, number in SHARDS.items())
    words = (*placed("submitted"), *jobs, *shards, "dpo.reference_shards=2")
    where = {"SLURM_CONF": str(cluster.slurm_conf)}
    chain = Chain(QUICKSTART, cluster, environment=where, overrides=words)
    command = [sys.executable, "-m", "medtrain", "run", QUICKSTART, *placed("direct")]
    with cluster.shared():
        chain.submit()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as run:
            stop_training_after_its_first_checkpoint(chain, "sft")
            assert run.wait(600) == 0, run.stdout and run.stdout.read().decode()
        chain.wait_done("report")
    return Pair(chain, Run(directory / "direct" / name))


def stop_training_after_its_first_checkpoint(chain: Chain, stage: str) -> None:
    saved = chain.run.root / stage / "checkpoints"
    chain.wait_until(lambda: any(saved.glob("*/complete.json")), f"{stage} saves")
    chain.cluster.run("scancel", "--signal=USR1", "--batch", chain.job(stage))


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_stages_give_the_rows_of_a_run_on_one_machine(pair: Pair, name: str) -> None:
    assert (pair.chain.run.root / name).read_bytes() == (pair.direct.root / name).read_bytes()


def test_models_scores_and_report_are_those_of_a_run_on_one_machine(pair: Pair) -> None:
    def digests(run: Run) -> dict[str, str]:
        made = [run.merged("sft"), run.preferences, run.merged("dpo"),
                run.scores, run.evaluation_rows, run.report]  # fmt: skip
        files = (file for path in made for file in tree_files(path))
        return {file.relative_to(run.root).as_posix(): sha256_file(file) for file in files}

    assert digests(pair.chain.run) == digests(pair.direct)


def test_every_array_had_its_shards(pair: Pair) -> None:
    numbers = {"generate.candidates": 2, "judge.verdicts": 2, "reference.sums": 2,
               "evaluate.answers": 3 * 2, "evaluate.verdicts": 3 * 2}  # fmt: skip
    for key, number in numbers.items():
        assert len(pair.chain.submission(key).tasks) == number, key
        assert pair.chain.rounds(key) == 1, key


def test_the_training_that_was_stopped_went_on_from_its_checkpoint(pair: Pair) -> None:
    log = pair.chain.log_of("sft")
    assert "queued again after 0 restarts" in log
    assert log.count("event=resume stage=sft") == 1
    assert pair.chain.rounds("sft") == 1


def test_status_says_that_everything_is_done(pair: Pair) -> None:
    status = pair.chain.status()
    assert status["done"]
    assert not status["problems"]
    assert [s["state"] for s in status["stages"]] == ["done"] * len(STAGES)
    log = pair.chain.run.log.read_text()
    assert "level=warning event=repair" not in log
    manifest = json.loads(pair.chain.run.manifest.read_text())
    assert list(manifest["stages"]) == [stage.name for stage in STAGES]
