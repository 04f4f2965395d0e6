"""Compiled kernels outlive a process, and lie where nobody else can put any."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from medtrain.kernel_cache import CACHE_VARIABLE, is_on_this_machine, keep_compiled_kernels

TOOLS = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (*TOOLS, CACHE_VARIABLE):
        # Set and taken away, so that what is set by the test is taken away after it.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_kernels_lie_in_the_users_cache_and_are_private(tmp_path: Path) -> None:
    directory = keep_compiled_kernels()
    assert directory is not None
    assert directory.is_relative_to(tmp_path)
    assert directory.stat().st_mode & 0o777 == 0o700
    assert {Path(os.environ[name]).parent for name in TOOLS} == {directory}


def test_what_a_user_has_set_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(TOOLS[0], "/own")
    directory = keep_compiled_kernels()
    assert os.environ[TOOLS[0]] == "/own"
    assert os.environ[TOOLS[1]] == f"{directory}/inductor"
    monkeypatch.setenv(TOOLS[1], "/own")
    assert keep_compiled_kernels() is None


def test_a_site_names_another_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "scratch" / "me"))
    assert keep_compiled_kernels() == tmp_path / "scratch" / "me"


def test_a_network_home_is_left_for_the_nodes_own_disk(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home = tmp_path / "cache"
    monkeypatch.setattr("medtrain.kernel_cache.is_on_this_machine", lambda path: path != home)
    assert keep_compiled_kernels() == tmp_path / f"medtrain-kernels-{os.getuid()}"


def test_where_every_disk_is_the_networks_the_tools_are_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("medtrain.kernel_cache.is_on_this_machine", lambda path: False)
    assert keep_compiled_kernels() is None
    assert not set(TOOLS) & set(os.environ)


def test_a_group_that_shares_the_umask_can_put_nothing_in_its_place(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        directory = keep_compiled_kernels()
    finally:
        os.umask(before)
    assert directory is not None
    made = [directory, *directory.parents][: len(directory.relative_to(tmp_path).parts)]
    assert {above.stat().st_mode & 0o777 for above in made} == {0o700}
    directory.parent.chmod(0o770)
    for name in TOOLS:
        del os.environ[name]
    other = keep_compiled_kernels()
    assert other != directory


def test_a_directory_that_others_may_write_to_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    for place in (shared, link):
        monkeypatch.setenv(CACHE_VARIABLE, str(place))
        assert keep_compiled_kernels() is None
        assert not any(name in os.environ for name in TOOLS)


def test_the_kind_of_a_file_system_is_that_of_the_innermost_mount(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        "22 21 0:40 / /home rw shared:2 - nfs4 server:/home rw\n"
        "23 22 8:2 / /home/with\\040blank rw - xfs /dev/sdb1 rw\n"
        "24 21 0:41 / /lustre rw - lustre a@tcp:/b rw\n"
    )
    assert is_on_this_machine(Path("/var/cache"), mounts)
    assert not is_on_this_machine(Path("/home/me/.cache"), mounts)
    assert is_on_this_machine(Path("/home/with blank/.cache"), mounts)
    assert not is_on_this_machine(Path("/lustre/me"), mounts)
    assert not is_on_this_machine(Path("/var"), tmp_path / "none")


def test_a_stage_runs_with_both_set_before_torch_is_imported(tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "import medtrain.pipeline as pipeline\n"
        "def look(*a, **k): print([os.environ.get(n) for n in "
        f"{TOOLS}], 'torch' in sys.modules)\n"
        "pipeline.run_stages = look\n"
        "import medtrain.cli as cli\n"
        "sys.argv = ['medtrain', 'run', 'configs/quickstart.yaml', f'output_dir={sys.argv[1]}']\n"
        "cli.main()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert str(tmp_path / "cache") in result.stdout
    assert "None" not in result.stdout
    assert result.stdout.strip().endswith("False")
