"""Prints what pyproject.toml asks for, with what is installed of it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

for line in requires("medtrain") or []:
    wanted = Requirement(line)
    if wanted.marker is not None and not wanted.marker.evaluate({"extra": "test"}):
        continue
    try:
        found = version(wanted.name)
    except PackageNotFoundError:
        found = "not installed"
    print(f"  {wanted.name:<20} {found:<14} ({wanted.specifier or 'any'})")
