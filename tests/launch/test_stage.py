"""Who trains, what is said, and what comes back from processes that fail."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from medtrain.console import Console
from medtrain.errors import BadNodeError, ConfigError, DataError, MedtrainError, TryAgainError
from medtrain.launch import check_launch, devices, launch, stage
from medtrain.lineage import Lineage
from medtrain.run import Run
from tests.launch.conftest import config
from tests.small_run import medtrain, write_config

QUIET = Console(quiet=True)
Runs = Callable[[str], None]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Have a launch run some code in place of medtrain."""

    def replace(code: str) -> None:
        monkeypatch.setattr(stage, "command", lambda *given: [sys.executable, "-c", code])

    return replace


def test_one_cpu_process_trains_here(run: Run) -> None:
    assert launch(run, config(), "sft", QUIET) is False


def test_several_train_elsewhere_and_the_log_says_how(run: Run, runs: Runs) -> None:
    runs("import os; assert os.environ['MEDTRAIN_STRATEGY'] == 'ddp'")
    assert launch(run, config(processes=2), "sft", Console(run.log, quiet=True)) is True
    said = run.log.read_text()
    assert "event=strategy stage=sft strategy=ddp processes=2" in said


def test_what_accelerate_starts_on_one_gpu_launches_nothing_again(tmp_path: Path) -> None:
    """Of one process accelerate sets no rank; each child would start the next one for ever."""
    script = tmp_path / "child.py"
    script.write_text(
        "from medtrain.environment import is_launched\nprint('LAUNCHED', is_launched())\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines=1",
               "--mixed_precision=no", "--dynamo_backend=no", "--num_processes=1", "--cpu",
               str(script)]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "LAUNCHED True" in result.stdout, result.stderr


def test_what_a_person_launches_on_a_cpu_is_refused_too(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MEDTRAIN_STRATEGY", "fsdp2")
    with pytest.raises(ConfigError, match="fsdp2 needs GPUs"):
        launch(run, config(), "sft", QUIET)


def test_more_processes_than_gpus(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "gpu_count", lambda: 2)
    with pytest.raises(BadNodeError, match="shows 2 GPUs"):
        launch(run, config(processes=3), "sft", QUIET)


def test_many_more_processes_than_cores(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "cpu_cores", lambda: 2)
    check_launch(config(processes=8))
    with pytest.raises(BadNodeError, match="has 2 CPU cores"):
        check_launch(config(processes=9))


def test_a_refusal_in_a_job_is_kept_for_the_job(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Lineage(run).record_failure("sft", DataError("of an earlier try"))
    monkeypatch.setenv("MEDTRAIN_IN_JOB", "1")
    with pytest.raises(ConfigError):
        launch(run, config(strategy="fsdp2"), "sft", QUIET)
    failure = Lineage(run).failure("sft")
    assert failure is not None
    assert failure["exit_code"] == 64


@pytest.mark.parametrize(
    ("override", "code"), [("train.strategy=fsdp2", 64), ("train.processes=900", 78)]
)
def test_a_refusal_of_the_command_is_kept_for_the_job_too(
    tmp_path: Path, base_dir: Path, override: str, code: int
) -> None:
    small = write_config(tmp_path, base_dir)
    assert medtrain("prepare", small).returncode == 0
    refused = medtrain("sft", small, override, MEDTRAIN_IN_JOB="1")
    assert refused.returncode == code, refused.stderr
    failure = Lineage(Run(tmp_path / "runs" / "small")).failure("sft")
    assert failure is not None
    assert failure["exit_code"] == code


def test_a_crash_after_a_stop_was_asked_for_is_a_crash(run: Run, runs: Runs) -> None:
    runs(
        f"import os, signal; os.kill({os.getpid()}, signal.SIGUSR1); "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert "SIGKILL" in failing(run).message


def failing(run: Run) -> MedtrainError:
    with pytest.raises(MedtrainError) as caught:
        launch(run, config(processes=2), "sft", QUIET)
    return caught.value


@pytest.mark.parametrize("kind", ["DataError", "TryAgainError"])
def test_the_first_error_of_a_process_is_the_error(
    run: Run, runs: Runs, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    runs(
        "from pathlib import Path\n"
        "from medtrain import errors\n"
        "from medtrain.lineage import Lineage\n"
        "from medtrain.run import Run\n"
        f"lineage = Lineage(Run(Path({str(run.root)!r})))\n"
        f"lineage.record_failure('sft', errors.{kind}('the first', fix='mend it'))\n"
        "lineage.record_failure('sft', errors.DataError('what followed from it'))\n"
        "raise SystemExit('a launcher says much')"
    )
    error = failing(run)
    assert type(error).__name__ == kind
    assert (error.message, error.fix) == ("the first", "mend it")
    assert capfd.readouterr().err == ""
    assert "says much" in (run.logs / "sft.launch.log").read_text()


def test_a_child_that_died_without_a_word(run: Run, runs: Runs) -> None:
    Lineage(run).record_failure("sft", DataError("of an earlier try"))
    runs("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    error = failing(run)
    assert error.message == "The only process or the launcher of sft was ended by SIGKILL"
    assert "memory ran out" in error.fix
    assert "sft.launch.log" in error.fix


def test_of_several_the_one_that_died_first_is_named(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "child.py").write_text(
        "import os, signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_DFL)\n"
        "if os.environ['RANK'] == '1': os.abort()\n"
        "time.sleep(60)\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    monkeypatch.setattr(stage, "command", lambda *given: [*torchrun, str(tmp_path / "child.py")])
    error = failing(run)
    assert error.message == "Process 1 of sft was ended by SIGABRT"
    assert "memory" not in error.fix


def test_processes_that_end_themselves_are_quoted_by_their_code(run: Run, runs: Runs) -> None:
    runs("raise SystemExit(3)")
    error = failing(run)
    assert error.message == "The sft processes ended with exit code 3"
    assert "sft.launch.log" in error.fix


def test_a_stop_before_anything_was_trained_is_to_be_tried_again(run: Run, runs: Runs) -> None:
    runs(f"import os; os.kill({os.getpid()}, {int(signal.SIGUSR1)}); raise SystemExit(1)")
    assert isinstance(failing(run), TryAgainError)


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
