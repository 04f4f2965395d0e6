"""A run from end to end, and what a user does to it: again, changed, killed, damaged, moved."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from medtrain.files import sha256_file, tree_files
from medtrain.run import Run
from tests.small_run import medtrain, write_config

ARTEFACTS = (
    "data", "sft/adapter", "sft/merged", "generate/candidates.jsonl", "judge/verdicts.jsonl",
    "preferences.jsonl", "pairs", "dpo/reference.jsonl", "dpo/adapter", "dpo/merged",
    "evaluate/base/answers.jsonl",
    "evaluate/sft/answers.jsonl", "evaluate/dpo/answers.jsonl", "evaluate/scores.json",
    "evaluate/rows.jsonl", "report/report.json",
)  # fmt: skip
STAGE_NAMES = (
    "prepare", "sft", "merge-sft", "generate", "judge", "pairs", "reference", "dpo", "merge-dpo",
    "evaluate", "report",
)  # fmt: skip


def events(output: str, name: str) -> list[dict[str, str]]:
    lines = (line for line in output.splitlines() if f" event={name} " in line)
    return [dict(part.split("=", 1) for part in _split(line)) for line in lines]


def _split(line: str) -> list[str]:
    import shlex

    return [part for part in shlex.split(line) if "=" in part]


def digests(run: Run) -> dict[str, str]:
    files = (file for name in ARTEFACTS for file in tree_files(run.root / name))
    return {file.relative_to(run.root).as_posix(): sha256_file(file) for file in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, base_dir: Path) -> tuple[Path, Run]:
    directory = tmp_path_factory.mktemp("finished")
    config = write_config(directory, base_dir)
    result = medtrain("run", config)
    assert result.returncode == 0, result.stdout + result.stderr
    return config, Run(directory / "runs" / "small")


@pytest.fixture
def copy(finished: tuple[Path, Run], tmp_path: Path) -> tuple[Path, Run]:
    """The finished run, moved to a directory of its own."""
    config, run = finished
    shutil.copytree(run.root, tmp_path / "runs" / "small", symlinks=True)
    moved = tmp_path / "small.yaml"
    moved.write_text(config.read_text().replace(str(run.root.parent), str(tmp_path / "runs")))
    return moved, Run(tmp_path / "runs" / "small")


def test_every_stage_has_a_receipt_and_every_artefact_is_there(finished: tuple[Path, Run]) -> None:
    _, run = finished
    for stage in STAGE_NAMES:
        receipt = json.loads((run.stages / f"{stage}.json").read_text())
        assert receipt["versions"]["medtrain"]
        assert receipt["outputs"]
    for name in ARTEFACTS:
        assert (run.root / name).exists(), name
    manifest = json.loads(run.manifest.read_text())
    assert tuple(manifest["stages"]) == STAGE_NAMES
    assert (run.report / "index.html").read_text().startswith("<!")


def test_run_directory_is_closed_to_others(finished: tuple[Path, Run]) -> None:
    assert finished[1].root.stat().st_mode & 0o027 == 0


def test_log_has_no_row_text(finished: tuple[Path, Run]) -> None:
    _, run = finished
    log = run.log.read_text()
    assert "event=stage_done" in log
    for file in run.logs.iterdir():
        assert "I understand your worry" not in file.read_text()
        assert "psoriasis" not in file.read_text()


def test_a_second_run_skips_everything_and_imports_nothing_heavy(copy: tuple[Path, Run]) -> None:
    config, run = copy
    before = digests(run)
    code = (
        f"import sys; sys.argv = ['medtrain', 'run', {str(config)!r}]\n"
        "from medtrain.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "print('HEAVY', sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "HEAVY []" in result.stdout, result.stdout + result.stderr
    assert len(events(result.stdout, "stage_skip")) == len(STAGE_NAMES)
    assert digests(run) == before


def test_a_changed_setting_reruns_what_depends_on_it_and_says_why(copy: tuple[Path, Run]) -> None:
    config, run = copy
    result = medtrain("run", config, "report.title=Another")
    assert [e["stage"] for e in events(result.stdout, "stage_start")] == ["report"]
    assert "report.title unset" in result.stdout
    result = medtrain("run", config, "report.title=Another", "dpo.beta=0.3")
    started = [e["stage"] for e in events(result.stdout, "stage_start")]
    assert started[:2] == ["dpo", "merge-dpo"]
    assert "evaluate" in started
    before = {"prepare", "sft", "merge-sft", "generate", "judge", "pairs", "reference"}
    assert not before & set(started)
    assert "dpo.beta 0.1 → 0.3" in result.stdout
    assert (run.root / "superseded" / "dpo" / "adapter").is_dir()


def test_settings_that_change_no_result_rerun_nothing(copy: tuple[Path, Run]) -> None:
    config, _ = copy
    result = medtrain("run", config, "judge.concurrency=2", "generate.num_shards=3",
                      "evaluate.batch_size=4", "sft.log_every=3", "sft.checkpoint_steps=5",
                      "dpo.reference_shards=2")  # fmt: skip
    assert events(result.stdout, "stage_start") == []


def test_changed_input_file_is_noticed(copy: tuple[Path, Run]) -> None:
    config, _ = copy
    rows = config.parent / "rows.jsonl"
    text = config.read_text()
    old_rows = next(line.split(": ")[1] for line in text.splitlines() if "rows.jsonl" in line)
    shutil.copy(old_rows, rows)
    config.write_text(text.replace(old_rows, str(rows)))

    def prepare_state() -> str:
        return str(json.loads(medtrain("status", config, "--json").stdout)["stages"][0]["state"])

    # The same rows at another place are the same input; one more row is not.
    assert prepare_state() == "done"
    rows.write_bytes(rows.read_bytes() + b'{"question": "Why?", "answer": "Because."}\n')
    assert prepare_state() == "stale"


def test_only_refuses_when_what_it_needs_does_not_hold(copy: tuple[Path, Run]) -> None:
    config, _ = copy
    result = medtrain("run", config, "--only", "dpo", "sft.learning_rate=0.5")
    assert result.returncode == 65
    assert "sft.learning_rate 0.005 → 0.5" in result.stderr
    assert "--until dpo" in result.stderr


def test_a_refused_command_changes_nothing(copy: tuple[Path, Run]) -> None:
    _, run = copy
    before = run.config.read_bytes(), digests(run)
    result = medtrain("dpo", run.root, "sft.learning_rate=0.5")
    assert result.returncode == 65
    assert (run.config.read_bytes(), digests(run)) == before
    elsewhere = run.root.parent / "never"
    assert medtrain("dpo", copy[0], "name=never").returncode == 65
    assert not elsewhere.exists()


def test_a_run_means_the_same_from_another_directory(tmp_path: Path, base_dir: Path) -> None:
    config = write_config(tmp_path, base_dir)
    config.write_text(config.read_text().replace(str(tmp_path / "rows.jsonl"), "rows.jsonl"))
    assert medtrain("run", config, "--until", "prepare", cwd=tmp_path).returncode == 0
    run = tmp_path / "runs" / "small"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    again = medtrain("run", run, "--until", "prepare", cwd=elsewhere)
    assert len(events(again.stdout, "stage_skip")) == 1, again.stdout + again.stderr
    # A path that leads nowhere from here is an error, and nothing is lost for it.
    wrong = "data.sources.0.path=there/rows.csv"
    lost = medtrain("run", config, wrong, "--until", "prepare", cwd=elsewhere)
    assert lost.returncode == 65
    assert "there/rows.csv" in lost.stderr
    assert json.loads(medtrain("status", run, "--json").stdout)["stages"][0]["state"] == "done"


def test_what_was_made_of_data_that_is_gone_still_counts(tmp_path: Path, base_dir: Path) -> None:
    config = write_config(tmp_path, base_dir)
    assert medtrain("run", config, "--until", "prepare").returncode == 0
    (tmp_path / "rows.jsonl").unlink()
    again = medtrain("run", config, "--until", "prepare")
    assert len(events(again.stdout, "stage_skip")) == 1, again.stdout + again.stderr
    changed = medtrain("run", config, "--until", "prepare", "data.eval_fraction=0.3")
    assert changed.returncode == 65
    assert "rows.jsonl" in changed.stderr


def test_a_model_that_is_out_of_date_is_not_pushed(copy: tuple[Path, Run]) -> None:
    config, run = copy
    config.write_text(config.read_text().replace("r: 4", "r: 2"))
    result = medtrain("push", config, "me/model", HF_TOKEN="hf_x")
    assert result.returncode == 65
    assert "stale" in result.stderr
    states = {s["name"]: s["state"] for s in
              json.loads(medtrain("status", config, "--json").stdout)["stages"]}  # fmt: skip
    assert (states["sft"], states["generate"]) == ("stale", "waits")
    assert run.merged("dpo").is_dir()


def test_force_runs_a_finished_stage_again_with_the_same_result(copy: tuple[Path, Run]) -> None:
    config, run = copy
    before = digests(run)
    result = medtrain("run", config, "--only", "generate", "--force", "generate")
    assert [e["stage"] for e in events(result.stdout, "stage_start")] == ["generate"]
    assert digests(run) == before
    # It really answered anew; what stood there is kept aside.
    assert (run.root / "superseded" / "generate" / "generate" / "candidates.jsonl").is_file()


def test_a_damaged_output_is_made_again(copy: tuple[Path, Run]) -> None:
    config, run = copy
    before = digests(run)
    run.verdicts.write_bytes(run.verdicts.read_bytes()[:-5])
    result = medtrain("run", config)
    assert "judge/verdicts.jsonl was changed" in result.stdout
    assert digests(run) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--from", "nonsense"], "Stages: prepare, sft"),
        (["--from", "dpo", "--until", "sft"], "comes after"),
        (["--only", "dpo", "--until", "sft"], "neither"),
        (["--until", "sft", "--force", "dpo"], "outside"),
        (["--only", "sft", "--force", "dpo"], "outside"),
    ],
)
def test_bad_selections(copy: tuple[Path, Run], arguments: list[str], words: str) -> None:
    result = medtrain("run", copy[0], *arguments)
    assert result.returncode == 64
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_a_report_follows_the_settings_it_shows(copy: tuple[Path, Run]) -> None:
    """Steps are bounded here, so that more epochs train the very same adapter."""
    config, run = copy
    result = medtrain("run", config, "dpo.epochs=3")
    assert [e["stage"] for e in events(result.stdout, "stage_start")] == ["dpo", "report"]
    assert json.loads((run.report / "report.json").read_text())["settings"]["dpo"]["epochs"] == 3


def test_another_name_is_another_run(finished: tuple[Path, Run]) -> None:
    _, run = finished
    status = json.loads(medtrain("status", run.root, "name=other", "--json").stdout)
    assert status["run"] == str(run.root.parent / "other")
    assert status["stages"][0]["state"] == "missing"


def test_a_terminal_without_arrows(copy: tuple[Path, Run]) -> None:
    config, _ = copy
    result = medtrain("run", config, "report.title=x", PYTHONIOENCODING="ascii")
    assert result.returncode == 0, result.stderr
    assert "report.title unset ? x" in result.stdout


def test_two_runs_at_once_are_refused(copy: tuple[Path, Run]) -> None:
    config, run = copy
    with run.lock():
        result = medtrain("run", config)
    assert result.returncode == 75
    assert f"process {os.getpid()}" in result.stderr


def test_status_tells_the_stages_and_the_next_command(copy: tuple[Path, Run]) -> None:
    _, run = copy
    shown = medtrain("status", run.root)
    assert shown.returncode == 0
    assert all(name in shown.stdout for name in STAGE_NAMES)
    assert "index.html" in shown.stdout
    assert str(run.root) in " ".join(shown.stdout.split())
    shutil.rmtree(run.merged("dpo"))
    status: dict[str, Any] = json.loads(medtrain("status", run.root, "--json").stdout)
    assert status["next_stage"] == "merge-dpo"
    assert status["next_command"].startswith("medtrain run ")


def test_ctrl_c_says_how_to_go_on(copy: tuple[Path, Run]) -> None:
    config, run = copy
    command = [sys.executable, "-m", "medtrain", "run", str(config), "sft.max_steps=5000"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that started pytest in the background has its children ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while process.poll() is None and not (run.stages / "sft.started.json").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "error: Interrupted" in said
    assert "Traceback" not in said


def test_sigkill_at_random_moments_ends_in_the_same_artefacts(
    finished: tuple[Path, Run], tmp_path: Path
) -> None:
    config, undisturbed = finished
    killed = tmp_path / "small.yaml"
    runs = tmp_path / "runs"
    killed.write_text(config.read_text().replace(str(undisturbed.root.parent), str(runs)))
    run, chance = Run(runs / "small"), random.Random(11)
    command = [sys.executable, "-m", "medtrain", "run", str(killed)]
    # A moment in each of these stages, and between them.
    for stage in ("sft", "generate", "reference", "dpo", "evaluate"):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        started = run.stages / f"{stage}.started.json"
        while process.poll() is None and not started.exists():
            time.sleep(0.02)
        time.sleep(chance.uniform(0.2, 4.0))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    result = medtrain("run", killed)
    assert result.returncode == 0, result.stdout + result.stderr
    assert digests(run) == digests(undisturbed)
