"""The logs of a run, wherever they were written, and nothing in them that a terminal would obey."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medtrain.cluster.ledger import Ledger
from medtrain.cluster.logs import harmless, label, last_lines, log_files, show_logs
from medtrain.console import Console
from medtrain.errors import ConfigError
from medtrain.run import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "run")
    run.create()
    return run


def submit(run: Run, key: str, stage: str, tasks: int = 0) -> Path:
    """A submission in the ledger; the folder its logs go to."""
    units = [[("candidates", shard)] for shard in range(tasks)]
    intent = Ledger(run).intend(key, steps=[("shards", stage, "")], tasks=units)
    assert intent is not None
    folder = run.job_folder(key, intent.number)
    folder.mkdir(parents=True)
    return folder


def write(path: Path, text: str, *, age_s: float = 0.0) -> Path:
    path.write_text(text)
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def test_without_a_stage_it_is_the_log_of_the_run(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run.log.write_text("".join(f"line {i}\n" for i in range(9)))
    show_logs(run, None, follow=False, lines=2, console=Console())
    assert capsys.readouterr().out == "line 7\nline 8\n"


def test_several_logs_say_whose_line_it_is(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = submit(run, "generate.candidates", "generate", tasks=2)
    write(folder / "13_0_0_log.out", "zero\n")
    write(folder / "13_1_0_log.out", "one\n")
    write(folder / "13_submission.sh", "#!/bin/sh\n")
    show_logs(run, "generate", follow=False, lines=5, console=Console())
    assert set(capsys.readouterr().out.splitlines()) == {"13_0 │ zero", "13_1 │ one"}


def test_failed_tasks_come_first_then_the_newest(run: Run) -> None:
    folder = submit(run, "generate.candidates", "generate", tasks=3)
    old = write(folder / "13_0_0_log.out", "fine\n", age_s=60)
    failed = write(folder / "13_1_0_log.out", "x\nTraceback (most recent call last):\n", age_s=90)
    new = write(folder / "13_2_0_log.out", "fine\n")
    write(folder / "13_2_0_log.err", "")
    assert log_files(run, "generate") == [failed, new, old]


def test_the_newest_submission_counts(run: Run) -> None:
    write(submit(run, "generate.candidates", "generate") / "13_0_log.out", "old\n")
    newest = write(submit(run, "generate.candidates", "generate") / "17_0_log.out", "new\n")
    closing = write(submit(run, "generate.candidates.close", "generate") / "18_0_log.out", "c\n")
    launched = write(run.logs / "generate.launch.log", "l\n")
    assert set(log_files(run, "generate")) == {newest, closing, launched}


def test_only_the_last_lines_of_a_large_log_are_read(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("".join(f"{i} {'x' * 200}\n" for i in range(5_000)))
    assert [line.split()[0] for line in last_lines(log, 3)] == ["4997", "4998", "4999"]
    log.write_text("no end of line")
    assert last_lines(log, 3) == ["no end of line"]


@given(st.binary(max_size=300), st.integers(1, 9))
def test_last_lines_are_those_of_the_whole_file(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, count: int
) -> None:
    log = tmp_path_factory.mktemp("l") / "log"
    log.write_bytes(data)
    lines = data.decode("utf-8", "replace").split("\n")
    if lines[-1] == "":
        lines.pop()
    assert last_lines(log, count) == lines[-count:]


@given(st.text(st.characters(max_codepoint=0x2100)))
def test_nothing_reaches_the_terminal_that_it_would_obey(text: str) -> None:
    assert all(c.isprintable() or c in "\t\N{NO-BREAK SPACE}" or c.isspace() for c in
               harmless(text) if ord(c) < 0xA0)  # fmt: skip
    assert "\x1b" not in harmless(text)


def test_colours_go_and_of_a_progress_bar_its_last_state_stays() -> None:
    assert harmless("\x1b[1;31merror\x1b[0m: no") == "error: no"
    assert harmless("\x1b]0;title\x07text") == "text"
    assert harmless("10 %\r50 %\r100 %\r") == "100 %"
    assert harmless("[bold]not markup[/bold]") == "[bold]not markup[/bold]"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("13_4_0_log.out", "13_4"),
        ("13_4_0_log.err", "13_4 err"),
        ("13_0_log.out", "13"),
        ("sft.launch.log", "sft.launch"),
    ],
)
def test_a_log_is_called_by_job_and_task(name: str, said: str) -> None:
    assert label(Path(name)) == said


def test_no_log_yet_is_said_with_what_to_do(run: Run) -> None:
    with pytest.raises(ConfigError, match="no log yet"):
        show_logs(run, "sft", follow=False, lines=5, console=Console())
    with pytest.raises(ConfigError, match="no stage 'sftt'"):
        show_logs(run, "sftt", follow=False, lines=5, console=Console())


def test_following_shows_new_lines_and_new_files_until_ctrl_c(run: Run) -> None:
    folder = submit(run, "generate.candidates", "generate", tasks=2)
    first = write(folder / "13_0_0_log.out", "before\n")
    code = (
        "import sys; from pathlib import Path\n"
        "from medtrain.cluster import logs\n"
        "from medtrain.console import Console; from medtrain.run import Run\n"
        "logs._FILES_EVERY_S = 0.1\n"
        "logs.show_logs(Run(Path(sys.argv[1])), 'generate', follow=True, lines=5,"
        " console=Console())\n"
    )
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", code, str(run.root)], stdout=subprocess.PIPE, text=True,
        env=environment,
    ) as follower:  # fmt: skip
        assert follower.stdout is not None
        # A line that does not come must not be waited for for ever.
        watchdog = threading.Timer(60, follower.kill)
        watchdog.start()
        try:
            assert follower.stdout.readline() == "before\n"
            with first.open("a") as log:
                log.write("half a li")
                log.flush()
                log.write("ne\n")
            assert follower.stdout.readline().endswith("half a line\n")
            write(folder / "13_1_0_log.out", "another task\n")
            assert follower.stdout.readline() == "13_1 │ another task\n"
            # A requeued task begins its log anew.
            first.write_text("anew\n")
            assert follower.stdout.readline() == "13_0 │ anew\n"
        finally:
            watchdog.cancel()
            follower.send_signal(2)
        assert follower.wait(20) == 0
