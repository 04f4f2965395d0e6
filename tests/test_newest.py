"""`.ci/run --newest` sees what is deprecated, whoever hides it, and whose call it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
NEWEST = ROOT / ".ci" / "newest"
PROGRAM = f"""
import logging, sys, types, warnings
warnings.simplefilter("ignore")
logging.disable()

def module(name, text, file):
    made = types.ModuleType(name)
    sys.modules[name] = made
    exec(compile(text, file, "exec"), made.__dict__)

module("library.old", "import warnings, logging\\n"
       "def f(): warnings.warn('f is deprecated', FutureWarning, stacklevel=2)\\n"
       "def g(): logging.getLogger('library').warning('g is deprecated')\\n"
       "def h(): warnings.warn('h is slow', UserWarning)\\n", "/site/library/old.py")
module("torch.calls", "def call(f): return f()\\n", "/site/torch/calls.py")
module("other", "def through(f): return f()\\n", "/site/other.py")
module("medtrain.fake", "from library.old import f, g, h\\n"
       "import sys\\n"
       "sys.modules['torch.calls'].call(f)\\n"
       "g()\\n"
       "h()\\n"
       "sys.modules['other'].through(f)\\n", {str(ROOT / "medtrain" / "fake.py")!r})
"""


def test_deprecations_are_noted_with_the_line_of_ours(tmp_path: Path) -> None:
    noted = tmp_path / "noted"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": str(NEWEST), "MEDTRAIN_DEPRECATED": str(noted)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert noted.read_text().splitlines() == [
        "ours medtrain/fake.py:3: FutureWarning: f is deprecated",
        "ours medtrain/fake.py:4: library: g is deprecated",
        "theirs other through medtrain/fake.py:6: FutureWarning: f is deprecated",
    ]


def test_the_versions_are_said() -> None:
    done = subprocess.run([sys.executable, str(NEWEST / "versions.py")], capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "transformers" in done.stdout


def test_another_word_is_refused() -> None:
    done = subprocess.run([str(ROOT / ".ci" / "run"), "--old"], capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 64
    assert "--newest" in done.stderr
