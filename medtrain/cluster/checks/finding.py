"""One line of the doctor: what was looked at, how it is, what was found, and what mends it.

A check that warns or fails always names its fix. Texts are one line without control characters,
wherever they came from; a secret's value is never given to any of these functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Mark = Literal["pass", "warn", "fail", "skip"]

_LONGEST = 400
"""Of a text, in characters: some errors of libraries go on for pages."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found."""

    check: str
    mark: Mark
    found: str
    fix: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """The numbers behind `found`, for `--json`."""

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "check": self.check,
            "mark": self.mark,
            "found": self.found,
            "fix": self.fix,
            "facts": dict(self.facts),
        }


def passed(check: str, found: str, **facts: Any) -> Finding:
    """All is well."""
    return Finding(check, "pass", one_line(found), "", facts)


def warned(check: str, found: str, fix: str, **facts: Any) -> Finding:
    """It works, but a person should look."""
    return Finding(check, "warn", one_line(found), one_line(fix), facts)


def failed(check: str, found: str, fix: str, **facts: Any) -> Finding:
    """A run would fail over this."""
    return Finding(check, "fail", one_line(found), one_line(fix), facts)


def skipped(check: str, why: str, **facts: Any) -> Finding:
    """It could not be looked at, or does not matter here."""
    return Finding(check, "skip", one_line(why), "", facts)


def one_line(text: str) -> str:
    """The text in one line that any terminal and log can show."""
    flat = " ".join(text.split())
    plain = "".join(c if c.isprintable() else "?" for c in flat)
    return plain if len(plain) <= _LONGEST else plain[: _LONGEST - 1] + "…"
