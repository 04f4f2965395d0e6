"""A training process ends with its exit code, whatever Python's end would still do."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import atexit, os, sys, threading, time
from medtrain.ending import Ending
{register}
class AbortsAtTheEnd:
    def __del__(self):
        os.abort()  # as a thread of gloo does that needs an interpreter which is ending
kept = AbortsAtTheEnd()
atexit.register(print, "handler")
print("said", end=" ")
threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
{end}
"""
REGISTER = "ending = Ending.register()"


def run(register: str, end: str) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(register=register, end=end)
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("code", [0, 75])
def test_a_process_leaves_with_its_code_after_all_others_have_ended(code: int) -> None:
    done = run(REGISTER, f"ending.code = {code}; sys.exit({code})")
    assert (done.returncode, done.stdout) == (code, "said thread\nhandler\n"), done.stderr


def test_an_end_that_nobody_foresaw_is_no_success() -> None:
    assert run(REGISTER, "sys.exit(0)").returncode == 70


def test_a_forked_child_ends_in_its_own_way() -> None:
    program = """
import os, sys
from medtrain.ending import Ending
ending = Ending.register()
child = os.fork()
if not child:
    sys.exit(0)
ending.code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) + 5
"""
    done = subprocess.run([sys.executable, "-c", program], timeout=60, check=False)
    assert done.returncode == 5


def test_a_reader_that_has_left_changes_no_code() -> None:
    read, write = os.pipe()
    os.close(read)
    program = PROGRAM.format(register=REGISTER, end="ending.code = 3")
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=write, env=buffered, timeout=60, check=False
    )
    os.close(write)
    assert done.returncode == 3


def test_without_it_the_end_of_python_aborts() -> None:
    assert run("", "sys.exit(0)").returncode < 0
