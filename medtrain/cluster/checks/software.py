"""Python, the libraries' versions, and the limit on open files.

Versions are read from the installed packages' metadata and compared with what medtrain's own
metadata (pyproject.toml) asks for; nothing is imported.
"""

from __future__ import annotations

import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, metadata, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from medtrain.cluster.checks.finding import Finding, failed, passed, warned

WATCHED = (
    "torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "deepspeed", "datasets",
    "submitit",
)  # fmt: skip
"""The libraries whose versions matter most."""

FEW_FILES, TOO_FEW_FILES = 1_024, 256


def check_software() -> list[Finding]:
    """Python, every watched library, and open files."""
    return [_python(), *_libraries(), open_files()]


def _python() -> Finding:
    bounds = metadata("medtrain")["Requires-Python"]
    found = platform.python_version()
    if SpecifierSet(bounds).contains(found, prereleases=True):
        return passed("python", f"{found} ({sys.executable})", version=found, bounds=bounds)
    return failed(
        "python",
        f"{found}, but medtrain needs {bounds}",
        "Make a virtual environment with a supported Python and install medtrain there.",
        version=found,
        bounds=bounds,
    )


def _libraries() -> list[Finding]:
    asked = [Requirement(line) for line in requires("medtrain") or []]
    wanted = {r.name: r for r in asked if r.marker is None or r.marker.evaluate({"extra": ""})}
    return [library(wanted[name]) for name in WATCHED if name in wanted]


def library(wanted: Requirement) -> Finding:
    """Whether one library is installed in a version that is asked for."""
    bounds, install = str(wanted.specifier), f"pip install '{wanted.name}{wanted.specifier}'"
    try:
        found = version(wanted.name)
    except PackageNotFoundError:
        return failed(wanted.name, f"not installed, needs {bounds}", install, bounds=bounds)
    if wanted.specifier.contains(found, prereleases=True):
        return passed(wanted.name, found, version=found, bounds=bounds)
    return failed(wanted.name, f"{found}, needs {bounds}", install, version=found, bounds=bounds)


def open_files() -> Finding:
    """The limit on open files of this process and its children."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    facts = {"soft": soft, "hard": hard}
    if soft == unlimited or soft >= FEW_FILES:
        return passed("open files", "unlimited" if soft == unlimited else f"{soft:,}", **facts)
    reachable = hard == unlimited or hard >= FEW_FILES
    fix = f"ulimit -n {FEW_FILES if reachable else hard}, in the shell and in cluster.setup"
    if not reachable:
        fix += f"; the hard limit is {hard}: ask the administrator for more"
    found = f"{soft} at a time; data loaders and sockets need {FEW_FILES:,}"
    kind = failed if soft < TOO_FEW_FILES else warned
    return kind("open files", found, fix, **facts)
