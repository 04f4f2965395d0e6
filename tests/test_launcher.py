"""Who starts training, what is launched, and what comes back from processes that fail."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from medtrain import launcher
from medtrain.config import RunConfig, parse_config
from medtrain.console import Console
from medtrain.errors import BadNodeError, ConfigError, DataError, MedtrainError, TryAgainError
from medtrain.lineage import Lineage
from medtrain.run import Run
from tests.small_run import medtrain, write_config

QUIET = Console(quiet=True)
Machine = Callable[[int], None]


def config(**train: object) -> RunConfig:
    return parse_config({"name": "r", "model": {"base": "b"}, "train": train,
                         "data": {"sources": [{"adapter": "table", "path": "x"}]}})  # fmt: skip


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    for variable in ("RANK", "LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(variable, raising=False)
    return lambda gpus: monkeypatch.setattr(launcher, "_gpu_count", lambda: gpus)


@pytest.mark.parametrize(("gpus", "multi"), [(1, False), (8, True)])
def test_accelerate_understands_the_command(machine: Machine, gpus: int, multi: bool) -> None:
    from accelerate.commands.launch import launch_command_parser

    machine(gpus)
    command = launcher.launch_command(config(), "sft", Path("c.yaml"))
    assert command is not None
    parsed = launch_command_parser().parse_args(command[3:])
    assert (parsed.num_processes, parsed.multi_gpu, parsed.module) == (gpus, multi, True)
    assert [parsed.training_script, *parsed.training_script_args] == ["medtrain", "sft", "c.yaml"]


def test_what_accelerate_starts_on_one_gpu_launches_nothing_again(tmp_path: Path) -> None:
    """Of one process accelerate sets no rank; each child would start the next one for ever."""
    script = tmp_path / "child.py"
    script.write_text("from medtrain import launcher\nprint('LAUNCHED', launcher.is_launched())\n")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines=1",
               "--mixed_precision=no", "--dynamo_backend=no", "--num_processes=1", "--cpu",
               str(script)]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "LAUNCHED True" in result.stdout, result.stderr


def test_a_cpu_trains_in_this_process(machine: Machine) -> None:
    machine(0)
    assert launcher.launch_command(config(), "sft", Path("c.yaml")) is None
    two = launcher.launch_command(config(processes=2), "sft", Path("c.yaml"))
    assert two is not None
    assert "--nproc_per_node=2" in two


def test_what_cannot_be_launched_is_said(machine: Machine, tmp_path: Path) -> None:
    machine(2)
    with pytest.raises(BadNodeError, match="shows 2 GPUs"):
        launcher.launch_command(config(processes=3), "sft", Path("c.yaml"))
    with pytest.raises(ConfigError, match="processes"):
        launcher.launch_command(config(processes=0), "sft", Path("c.yaml"))
    missing = config(accelerate_config=str(tmp_path / "fsdp.yaml"))
    with pytest.raises(ConfigError, match="there is no file"):
        launcher.launch_command(missing, "sft", Path("c.yaml"))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = Run(tmp_path / "run")
    made.create()
    return made


def failing(run: Run, code: str) -> MedtrainError:
    with pytest.raises(MedtrainError) as caught:
        launcher.launch(run, [sys.executable, "-c", code], "sft", QUIET)
    return caught.value


def test_the_error_of_a_child_is_the_error(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    code = (
        "from pathlib import Path\n"
        "from medtrain.errors import DataError\n"
        "from medtrain.lineage import Lineage\n"
        "from medtrain.run import Run\n"
        f"lineage = Lineage(Run(Path({str(run.root)!r})))\n"
        "lineage.record_failure('sft', DataError('the first', fix='mend it'))\n"
        "lineage.record_failure('sft', DataError('what followed from it'))\n"
        "raise SystemExit('a launcher says much')"
    )
    error = failing(run, code)
    assert isinstance(error, DataError)
    assert (error.message, error.fix) == ("the first", "mend it")
    assert capfd.readouterr().err == ""
    assert "says much" in (run.logs / "sft.launch.log").read_text()


def test_a_child_that_died_without_a_word(run: Run) -> None:
    Lineage(run).record_failure("sft", DataError("of an earlier try"))
    error = failing(run, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert "exit code -9" in error.message
    assert "sft.launch.log" in error.fix


def test_a_training_that_outlived_its_parent_holds_the_run(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as child:
        for name, value in run.lock_environment().items():
            child.setenv(name, value)
        held = run.lock()
        held.__enter__()
    with pytest.raises(TryAgainError, match="Another medtrain"), run.lock():
        pass
    held.__exit__(None, None, None)
    with run.lock():
        pass


def test_two_processes_that_fail_end_in_one_message(tmp_path: Path, base_dir: Path) -> None:
    small = write_config(tmp_path, base_dir)
    result = medtrain("run", small, "--until", "sft", "train.processes=2",
                      "sft.lora.targets=[no_such_layer]")  # fmt: skip
    assert result.returncode == 64, result.stderr
    assert result.stderr.count("error: ") == 1
    assert "no_such_layer" in result.stderr
    assert "Traceback" not in result.stdout + result.stderr
