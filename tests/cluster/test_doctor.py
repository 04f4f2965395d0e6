"""The doctor looks at this very machine; only GPUs and Slurm, which may be absent, are played."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement
from rich.console import Console as RichConsole

from medtrain.cluster.checks import access, all_reduce, devices, filesystem, software
from medtrain.cluster.checks.asking import ask, start
from medtrain.cluster.checks.finding import Finding
from medtrain.cluster.checks.probe import ProbeResult, probe_options, script
from medtrain.cluster.checks.probe_findings import judge_probe
from medtrain.cluster.checks.scheduler import ask_slurm
from medtrain.cluster.doctor import DoctorReport, run_doctor
from medtrain.config import RunConfig
from medtrain.config.cluster import ClusterConfig
from medtrain.config.load import parse_config
from medtrain.console import Console

PLANTED = "sk-planted-0123456789"


def config_with(**sections: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "name": "small",
        "model": {"base": "builtin:tiny"},
        "data": {"sources": [{"adapter": "table", "path": "rows.jsonl"}]},
        "judge": {"kind": "rules"},
    }
    return parse_config({**tree, **sections})


def by_check(findings: list[Finding] | tuple[Finding, ...]) -> dict[str, Finding]:
    return {finding.check: finding for finding in findings}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def report(kept: Path) -> DoctorReport:
    return run_doctor(None, Console(quiet=True), cluster=False, directory=kept)


# The whole


def test_a_working_machine_passes(report: DoctorReport) -> None:
    found = by_check(report.findings)
    working = "python, torch, nf4 kernel, attention, all-reduce, write access, flock"
    for check in working.split(", "):
        assert found[check].mark == "pass", found[check]
    assert found["cuda"].mark == "warn"  # the tests hide GPUs
    assert "gloo" in found["all-reduce"].found
    failures = [finding.check for finding in report.findings if finding.mark == "fail"]
    assert report.exit_code == (78 if failures else 0)


def test_it_leaves_nothing_behind(report: DoctorReport, kept: Path) -> None:
    assert report.findings
    assert list(kept.iterdir()) == []


def test_what_is_not_well_has_a_fix(report: DoctorReport) -> None:
    for finding in report.findings:
        assert finding.found
        assert bool(finding.fix) == (finding.mark in ("warn", "fail")), finding


def test_the_json_form_says_the_same(report: DoctorReport) -> None:
    tree = json.loads(json.dumps(report.to_json()))
    assert [c["check"] for c in tree["checks"]] == [f.check for f in report.findings]
    assert sum(tree["counts"].values()) == len(report.findings)
    assert tree["exit_code"] == report.exit_code
    assert tree["checks"][0]["facts"]["version"] == ".".join(map(str, sys.version_info[:3]))


def test_a_log_gets_plain_lines(report: DoctorReport, capsys: pytest.CaptureFixture[str]) -> None:
    report.show(Console())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(report.findings) + 1
    assert all(line.startswith("time=") and line.isprintable() for line in lines)
    assert sum("check=cuda mark=warn" in line for line in lines) == 1


def test_a_terminal_gets_a_table_with_the_fix_below(report: DoctorReport) -> None:
    console = RichConsole(width=80, force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(report)
    lines = capture.get().splitlines()
    cuda = next(number for number, line in enumerate(lines) if " cuda " in line)
    assert lines[cuda].startswith("!")
    assert any("→ Fine on a login node" in line for line in lines[cuda + 1 : cuda + 3])


def test_one_failure_decides_the_exit_code() -> None:
    good, bad = Finding("a", "pass", "x"), Finding("b", "fail", "y", "mend it")
    assert DoctorReport((good,)).exit_code == 0
    assert DoctorReport((good, bad)).exit_code == 78


def test_it_imports_no_torch_itself() -> None:
    code = "import medtrain.cluster.doctor, sys; print({'torch', 'transformers'} & {*sys.modules})"
    assert ask(sys.executable, "-c", code, timeout_s=60).out.strip() == "set()"


# Software and devices


def test_a_library_out_of_bounds_fails_with_the_command() -> None:
    found = software.library(Requirement("rich>=99"))
    assert (found.mark, found.fix) == ("fail", "pip install 'rich>=99'")
    absent = software.library(Requirement("no-such-library-of-ours>=1"))
    assert absent.mark == "fail"
    assert "not installed" in absent.found


@pytest.mark.parametrize(("limit", "mark"), [(200, "fail"), (700, "warn"), (1024, "pass")])
def test_the_limit_on_open_files(limit: int, mark: str) -> None:
    code = (
        "import resource; hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, hard))\n"
        "from medtrain.cluster.checks.software import open_files\n"
        "found = open_files(); print(found.mark, found.fix)"
    )
    answer = ask(sys.executable, "-c", code, timeout_s=60)
    assert answer.out.split()[0] == mark, answer
    assert ("ulimit -n" in answer.out) == (mark != "pass")


def test_a_gpu_that_pytorch_does_not_see_fails(commands: Callable[..., None]) -> None:
    commands(**{"nvidia-smi": "echo 470.82.01; echo 470.82.01"})
    with devices.start_device_task() as task:
        found = by_check(devices.check_devices(task, None))
    assert found["cuda"].mark == "fail"
    assert "2 GPUs here, but PyTorch sees none" in found["cuda"].found
    assert found["nf4 kernel"].mark == "pass"


def test_a_wrong_kernel_matters_where_it_is_used() -> None:
    wrong = {"device": "cuda:0", "dtype": "bfloat16", "difference": 0.7, "rounding": 0.1,
             "right": False}  # fmt: skip
    assert devices.nf4(wrong, None).mark == "fail"
    unused = config_with(model={"base": "builtin:tiny", "quantization": "none"})
    assert devices.nf4(wrong, unused).mark == "warn"
    assert "ImportError" in devices.nf4({"error": "ImportError: no libcudart"}, None).found


def test_a_gpu_without_a_kernel_for_packed_rows_is_warned_of() -> None:
    slow = {"kernel": "rows", "reason": "no varlen: PyTorch 2.8 has none", "dtype": "bfloat16"}
    finding = devices.attention(slow)
    assert (finding.mark, "PyTorch 2.8 has none" in finding.found) == ("warn", True)
    fast = devices.attention({"kernel": "varlen", "reason": "", "dtype": "bfloat16"})
    assert (fast.mark, fast.found.endswith("in bfloat16")) == ("pass", True)
    broken = {**slow, "kernel": "efficient", "surprising": True}
    assert devices.attention(broken).mark == "warn"
    cpu = {"kernel": "rows", "reason": "no GPU", "dtype": "float32"}
    assert devices.attention(cpu).mark == "pass"


# All-reduce


def test_a_partner_out_of_reach_is_a_finding_and_not_a_hang() -> None:
    module = "medtrain.cluster.checks.all_reduce_task"
    with start(module, "1", "2", "127.0.0.1", "9", "2") as rank:
        found = all_reduce.judge_ranks("all-reduce", [rank.result(60)], "two nodes")
    assert found.mark == "fail"
    assert "rank 0, rendezvous on 127.0.0.1:9" in found.found
    assert "NCCL_SOCKET_IFNAME" in found.fix


def test_a_child_that_hangs_is_ended() -> None:
    with start("http.server", "0", "--bind", "127.0.0.1") as child:
        assert child.result(0.2).problem == "no answer within 0.2 s"
        assert "SIGKILL" in child.result(5).problem


def test_a_child_that_breaks_is_quoted() -> None:
    with start("medtrain.no_such_module") as child:
        assert "no_such_module" in child.result(30).problem


def test_a_wrong_sum_fails() -> None:
    value = {"step": "done", "backend": "nccl", "mb_per_s": 9, "right": False}
    with_two = [all_reduce.ChildResult(value, "")] * 2
    assert all_reduce.judge_ranks("all-reduce", with_two, "two nodes").mark == "fail"


# The file system


def test_a_place_that_takes_no_files_fails() -> None:
    found = by_check(filesystem.check_file_system(Path("/proc/medtrain"), None))
    assert found["write access"].mark == "fail"
    assert "output_dir" in found["write access"].fix


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one mebibyte."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    if not ask("mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=200", "none", str(mounted)).ok:
        pytest.skip("mounting needs root")
    yield mounted
    subprocess.run(["umount", "-l", mounted], check=True)


def test_a_full_disk_fails(small_disk: Path) -> None:
    found = by_check(filesystem.check_file_system(small_disk, None))
    assert found["disk space"].mark == "fail"
    assert found["inodes"].mark == "fail"
    (small_disk / "filler").write_bytes(bytes(2**20))
    found = by_check(filesystem.check_file_system(small_disk, None))
    assert "No space left" in found["write access"].found
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_little_space_is_a_warning_for_a_large_base(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    with (base / "model.safetensors").open("wb") as handle:
        handle.truncate(2**42)  # 4 TiB, of holes
    config = config_with(model={"base": str(base)})
    found = by_check(filesystem.check_file_system(tmp_path, config))["disk space"]
    assert found.mark == "warn"
    assert "16,385 GiB" in found.found


def test_a_directory_that_everyone_may_write_to(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    found = by_check(filesystem.check_file_system(tmp_path, None))["permissions"]
    assert (found.mark, found.fix) == ("warn", f"chmod o-w {tmp_path}")
    run = tmp_path / "small"
    (run / "stages").mkdir(parents=True)
    run.chmod(0o777)
    found = by_check(filesystem.check_file_system(tmp_path, config_with()))["permissions"]
    assert (found.mark, found.fix) == ("fail", f"chmod o-w {run}")


def test_a_directory_that_does_not_exist_is_not_made(tmp_path: Path) -> None:
    found = by_check(filesystem.check_file_system(tmp_path / "a" / "b", None))
    assert found["write access"].mark == "pass"
    assert list(tmp_path.iterdir()) == []


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_distance_to_an_interval(value: float, low: float, width: float) -> None:
    high = low + width
    distance = filesystem.outside(value, low, high)
    assert (distance == 0) == (low <= value <= high)
    assert (distance < 0) == (value < low)


# Secrets and the hub


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    path = tmp_path / "secrets"
    path.write_text(f"# of the judge\nexport OPENAI_API_KEY={PLANTED}\nHF_TOKEN={PLANTED}\n")
    path.chmod(0o600)
    return path


def test_a_secrets_file_that_others_may_read_fails(secrets: Path) -> None:
    site = ClusterConfig(secrets_file=str(secrets))
    assert by_check(access.check_access(None, site, cluster=False))["secrets file"].mark == "pass"
    secrets.chmod(0o644)
    found = by_check(access.check_access(None, site, cluster=False))["secrets file"]
    assert (found.mark, found.fix) == ("fail", f"chmod 600 {secrets}")
    secrets.unlink()
    found = by_check(access.check_access(None, site, cluster=False))["secrets file"]
    assert found.mark == "fail"


def test_no_form_of_the_report_shows_a_secret(
    secrets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", PLANTED)
    monkeypatch.setenv("HF_TOKEN", PLANTED)
    config = config_with(
        model={"base": "someone/model"},
        judge={"kind": "openai"},
        generate={"engine": "openai", "base_url": f"https://me:{PLANTED}@example.org/v1",
                  "api_key_env": "OTHER_KEY"},
        cluster={"secrets_file": str(secrets)},
    )  # fmt: skip
    found = run_doctor(config, Console(), cluster=False, directory=tmp_path)
    checks = by_check(found.findings)
    assert [checks[name].mark for name in ("judge key", "hub token")] == ["pass", "pass"]
    assert checks["generate key"].mark == "warn"
    found.show(Console())
    shown = capsys.readouterr().out + json.dumps(found.to_json()) + repr(found)
    assert "example.org" in shown
    assert PLANTED not in shown


def test_the_judges_key(secrets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def mark(base_url: str | None, **cluster: str) -> str:
        config = config_with(judge={"kind": "openai", "base_url": base_url}, cluster=cluster)
        findings = access.check_access(config, config.cluster, cluster=False)
        return by_check(findings)["judge key"].mark

    assert mark(None) == "fail"
    assert mark("https://llm.example.org/v1") == "warn"
    assert mark("http://127.0.0.1:8000/v1") == "skip"
    assert mark(None, secrets_file=str(secrets)) == "pass"


def test_offline_nodes_need_the_whole_base_in_the_cache(tmp_path: Path) -> None:
    site = ClusterConfig(hf_home=str(tmp_path))
    config = config_with(model={"base": "someone/model"}, cluster={"hf_home": str(tmp_path)})

    def look() -> Finding:
        return by_check(access.check_access(config, site, cluster=True))["hub cache"]

    assert "is not in" in look().found
    stored = tmp_path / "hub" / "models--someone--model"
    snapshot = stored / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text("{}")
    weights = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(weights))
    (snapshot / "model-1.safetensors").touch()
    assert "no model-2.safetensors" in look().found
    assert "prepare --fetch" in look().fix
    (snapshot / "model-2.safetensors").touch()
    assert look().mark == "pass"


# Slurm, played by scripts


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts shell scripts of these names before everything else on the PATH."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")

    def put(**scripts: str) -> None:
        for name, body in scripts.items():
            path = directory / name
            path.write_text(f"#!/bin/sh\n{body}\n")
            path.chmod(path.stat().st_mode | stat.S_IXUSR)

    return put


def played_slurm(*, ping: str = "UP", settings: str = "", sacct: str = "exit 0") -> dict[str, str]:
    answers = f"""case "$*" in
*ping*) echo 'Slurmctld(primary) at head is {ping}' ;;
*config*) printf '%s\\n' 'SLURM_VERSION = 23.11.4' 'MinJobAge = 300 sec' {settings} ;;
*partition*) echo 'PartitionName=gpu Default=YES State=UP TotalNodes=8 MaxTime=1-02:00:00 \
DefaultTime=01:00:00 PreemptMode=OFF GraceTime=0' ;;
esac"""
    others = dict.fromkeys(("sbatch", "squeue", "sinfo", "srun", "scancel"), "exit 0")
    return {**others, "scontrol": answers, "sacct": sacct, "sacctmgr": "echo physics"}


def test_a_machine_without_slurm_says_so_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    slurm = ask_slurm(config_with())
    assert [finding.mark for finding in slurm.findings] == ["fail"]
    assert not slurm.answers


def test_a_controller_that_is_down_is_one_finding(commands: Callable[..., None]) -> None:
    commands(**played_slurm(ping="DOWN"))
    slurm = ask_slurm(config_with())
    assert [finding.mark for finding in slurm.findings] == ["fail"]
    assert "does not answer" in slurm.findings[0].found


def test_slurms_limits_are_named(commands: Callable[..., None]) -> None:
    settings = (
        "'MaxArraySize = 101' 'MaxJobCount = 10000' 'JobRequeue = 0' "
        "'PreemptType = preempt/qos' 'PreemptMode = CANCEL' 'AccountingStorageEnforce = limits'"
    )
    commands(**played_slurm(settings=settings, sacct="echo 'sacct: no database' >&2; exit 1"))
    config = config_with(
        generate={"num_shards": 1000},
        cluster={"account": "medicine", "partition": "gpu", "time_min": 5000,
                 "stages": {"cpu": {"partition": "gone", "time_min": 5}}},
    )  # fmt: skip
    slurm = ask_slurm(config)
    found = by_check(slurm.findings)
    assert "1,000 shards make 10 arrays" in found["array limits"].found
    assert found["sacct"].mark == "warn"
    assert "no database" in found["sacct"].found
    assert found["requeue"].mark == "warn"
    assert found["preemption"].mark == "warn"
    assert found["account"].mark == "fail"
    assert "physics" in found["account"].fix
    partitions = [f for f in slurm.findings if f.check == "partition"]
    assert {f.mark for f in partitions} == {"fail"}
    assert any("time_min to 1560" in f.fix for f in partitions)
    assert any("no partition gone" in f.found for f in partitions)


def test_no_job_is_submitted_that_could_not_answer(
    commands: Callable[..., None], tmp_path: Path
) -> None:
    asked = tmp_path / "asked"
    settings = "'MaxArraySize = 1001' 'MaxJobCount = 10000'"
    commands(**{**played_slurm(settings=settings), "sbatch": f"touch {asked}; exit 1"})
    quiet, nowhere = Console(quiet=True), Path("/proc/medtrain")
    found = by_check(run_doctor(None, quiet, cluster=True, directory=nowhere).findings)
    assert found["probe job"].mark == "skip"
    assert not asked.exists()
    found = by_check(run_doctor(None, quiet, cluster=True, directory=tmp_path).findings)
    assert found["probe job"].mark == "fail"
    assert asked.exists()


# What the probe found


def task(host: str, **changes: Any) -> dict[str, Any]:
    import medtrain

    reduced = {"step": "done", "backend": "gloo", "mb_per_s": 900, "right": True,
               "clock_skew_s": 0.01}  # fmt: skip
    found = {
        "host": host, "python": sys.executable, "package": str(Path(medtrain.__file__).parent),
        "now": time.time(), "server_ahead_s": 0.0, "lock_is_shared": True, "missing": [],
        "gpus": [], "visible_devices": None, "submits": "", "links_won": 25,
        "all_reduce": {"value": reduced, "problem": ""},
    }  # fmt: skip
    return {**found, **changes}


def probed(first: dict[str, Any], second: dict[str, Any], **changes: Any) -> ProbeResult:
    now = time.time()
    return ProbeResult(
        **{
            "job_id": "7",
            "state": "RUNNING",
            "submitted": now - 10,
            "tasks": {0: first, 1: second},
            "seen": {0: now + 10, 1: now + 10},
            "signals": {0: 30.0, 1: 31.0},
            **changes,
        }
    )


def judged(result: ProbeResult, **cluster: Any) -> dict[str, Finding]:
    return by_check(
        judge_probe(
            result,
            config_with(model={"base": "a/b"}, cluster={"gpus": 0, **cluster}),
            Path("/runs"),
        )
    )


def test_a_good_probe_passes() -> None:
    found = judged(probed(task("n1"), task("n2")))
    assert {f.mark for f in found.values()} == {"pass", "skip"}
    assert "149 s before" in found["job signal"].found


@pytest.mark.parametrize(
    ("check", "mark", "words", "changes"),
    [
        ("job python", "warn", "/other/python", {"python": "/other/python"}),
        ("job files", "fail", "does not see /cache", {"missing": ["/cache"]}),
        ("job locks", "warn", "takes a lock that this host holds", {"lock_is_shared": False}),
        ("job locks", "fail", "taken 75 times", {"links_won": 50}),
        ("job clocks", "fail", "s to this host", {"now": 0.0}),
        ("job clocks", "warn", "5.00 s to files", {"server_ahead_s": 5.0}),
        ("job all-reduce", "fail", "killed", {"all_reduce": {"value": {}, "problem": "killed"}}),
        ("job sbatch", "warn", "not allowed", {"submits": "not allowed"}),
    ],
)
def test_what_a_task_saw(check: str, mark: str, words: str, changes: dict[str, Any]) -> None:
    found = judged(probed(task("n1", **changes), task("n2")))[check]
    assert found.mark == mark
    assert words in found.found
    assert found.fix


def test_gpus_that_were_asked_for_must_be_there() -> None:
    assert judged(probed(task("n1"), task("n2")), gpus=4)["job gpus"].mark == "fail"
    one = {"gpus": ["GPU 0: H100"]}
    assert judged(probed(task("n1", **one), task("n2", **one)), gpus=4)["job gpus"].mark == "pass"


def test_a_signal_that_never_came_is_a_warning() -> None:
    found = judged(probed(task("n1"), task("n2"), signals={0: 30.0, 1: None}))["job signal"]
    assert found.mark == "warn"
    assert "1 of 2" in found.found


@pytest.mark.parametrize(
    ("result", "mark", "words"),
    [
        (ProbeResult(refused="invalid account"), "fail", "invalid account"),
        (ProbeResult(job_id="7", state="PENDING", reason="Priority"), "warn", "Priority"),
        (ProbeResult(job_id="7", state="FAILED", reason="None"), "fail", "left no file in /runs"),
        (ProbeResult(job_id="7", state="FAILED", log="no python"), "fail", "no python"),
    ],
)
def test_a_probe_that_told_nothing(result: ProbeResult, mark: str, words: str) -> None:
    found = judged(result)["probe job"]
    assert found.mark == mark
    assert words in found.found
    assert found.fix


# What the probe asks for


def test_the_probe_asks_for_what_training_asks_for() -> None:
    cluster = {
        "account": "a", "partition": "cpu", "gpus": 0, "cpus": 32, "time_min": 600,
        "sbatch": {"mail-type": "ALL", "gres": "lustre:1"},
        "stages": {"sft": {"partition": "gpu", "gpus": 8, "gpu_type": "h100"}},
    }  # fmt: skip
    options = probe_options(config_with(model={"base": "a/b"}, cluster=cluster))
    assert options[:2] == ["--account=a", "--partition=gpu"]
    assert "--gres=lustre:1" in options
    assert not any(option.startswith(("--cpus", "--time", "--requeue")) for option in options)
    assert "--gpus-per-node=h100:1" in options
    assert not any("mail" in option for option in options)


def test_the_probes_script_is_one_that_bash_reads(tmp_path: Path) -> None:
    cluster = {
        "modules": ["cuda/12 x"], "activate": "source env", "setup": ["umask 077"],
        "environment": {"NOTE": "it's $HOME"}, "container": "apptainer exec --nv m.sif",
    }  # fmt: skip
    text = script(config_with(cluster=cluster), tmp_path / "a b")
    assert ask("bash", "-n", stdin=text).ok
    assert "module load 'cuda/12 x'\nsource env\numask 077\n" in text
    assert " apptainer exec --nv m.sif " in text
