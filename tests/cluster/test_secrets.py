"""Keys: from the shell's environment or a 0600 file, and in nothing that is shown or written."""

from __future__ import annotations

from pathlib import Path

import pytest

from medtrain.cluster.chain import plan_chain, steps_of
from medtrain.config import load_config
from medtrain.stages import STAGES
from tests.cluster.test_dispatch import DispatcherOf, FakeSbatch, dispatcher, sbatch
from tests.small_run import medtrain, write_config

__all__ = ["dispatcher", "sbatch"]

IN_SHELL, IN_FILE = "sk-planted-in-the-shell", "hf_planted_in_the_file"


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    path = tmp_path / "keys.env"
    path.write_text(f"# keys\nexport HF_TOKEN='{IN_FILE}'\n\n")
    path.chmod(0o600)
    return path


def assert_clean(text: str) -> None:
    assert IN_SHELL not in text
    assert IN_FILE not in text


def test_a_dry_run_shows_no_key(tmp_path: Path, secrets: Path) -> None:
    config = write_config(tmp_path, tmp_path)
    judge = ["judge.kind=openai", f"cluster.secrets_file={secrets}"]
    for arguments in ([], ["cluster.acount=x"]):
        done = medtrain(
            "submit", config, *judge, *arguments, "--dry-run", "--debug", OPENAI_API_KEY=IN_SHELL
        )
        assert done.returncode == (64 if arguments else 0), done.stderr
        assert_clean(done.stdout + done.stderr)
    assert str(secrets) not in done.stdout, "nor does any script name the file"


def test_nothing_that_is_submitted_holds_a_key(
    tmp_path: Path,
    secrets: Path,
    sbatch: FakeSbatch,
    dispatcher: DispatcherOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", IN_SHELL)
    ours = dispatcher(f"cluster.secrets_file={secrets}", "judge.kind=openai")
    jobs = plan_chain(steps_of(STAGES, ours.config), ours.config)
    for job in jobs:
        ours.submit(job, {})
    for call in range(sbatch.count):
        assert_clean(sbatch.read(call, "arguments"))
        # The key reaches the job in its environment, and nowhere else.
        assert IN_SHELL in sbatch.read(call, "environment")
    written = [path for path in ours.run.root.rglob("*") if path.is_file()]
    assert len(written) > len(jobs)
    for path in written:
        content = path.read_bytes()
        assert IN_SHELL.encode() not in content, path
        assert IN_FILE.encode() not in content, path


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_secrets_file_of_others_is_refused_before_anything_is_queued(
    tmp_path: Path, secrets: Path, mode: int, sbatch: FakeSbatch
) -> None:
    secrets.chmod(mode)
    config = write_config(tmp_path, tmp_path)
    done = medtrain("submit", config, f"cluster.secrets_file={secrets}")
    assert done.returncode == 64
    assert f"chmod 600 {secrets}" in done.stderr
    assert sbatch.count == 0
    assert not Path(load_config(config).output_dir).exists()


def test_a_line_that_is_no_assignment_is_not_quoted(
    tmp_path: Path, secrets: Path, sbatch: FakeSbatch
) -> None:
    secrets.write_text(f"{IN_FILE}\n")
    config = write_config(tmp_path, tmp_path)
    done = medtrain("submit", config, f"cluster.secrets_file={secrets}")
    assert done.returncode == 64
    assert "line 1" in done.stderr
    assert_clean(done.stdout + done.stderr)
