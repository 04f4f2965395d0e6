"""How much the acceptance tests do: on a card enough to show something, on a CPU enough to run."""

from __future__ import annotations

from typing import NamedTuple


class Size(NamedTuple):
    on_card: bool
    exact_steps: int
    """Of SFT, whose losses are compared step by step."""
    stopped_steps: int
    stop_at: int
    """The step whose line of metrics lets SIGTERM be sent."""
    at_once: int
    """Commands that run at the same time."""
    threads: int
    """Of each command."""


FULL = Size(True, exact_steps=40, stopped_steps=120, stop_at=30, at_once=6, threads=2)
TINY = Size(False, exact_steps=4, stopped_steps=8, stop_at=2, at_once=2, threads=1)
