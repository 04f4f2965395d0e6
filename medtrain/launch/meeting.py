"""What all nodes must agree on before they start: the head's address, a free port, the strategy.

The head node decides (GPUs may differ from node to node), tries which port is free, and publishes
all of it in the run directory, under a name that only the tasks of this try of this job step have.
The others wait for that file. One node needs no meeting: its launcher takes any free port.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from medtrain.config.training import Strategy
from medtrain.errors import BadNodeError
from medtrain.files import canonical_json, publish
from medtrain.launch.place import NodePlace
from medtrain.run import Run

_FIRST_PORT, _PORTS = 20_000, 10_000
_TRIES, _APART = 16, 631
_WAIT_S = 900.0
"""Longer than a network file system remembers a file's absence, and than nodes start apart."""
_PAUSE_S = 0.2


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where the processes of all nodes find each other, and how they will train."""

    strategy: Strategy
    head: str = ""
    port: int = 0


@contextmanager
def agreed(
    run: Run, stage: str, place: NodePlace, decide: Callable[[], Strategy], wait_s: float = _WAIT_S
) -> Iterator[Meeting]:
    """What the head node decides, for as long as the block lasts.

    Raises:
        BadNodeError: no port is free, or the head has not published within `wait_s` seconds.
    """
    if place.nodes == 1:
        yield Meeting(decide())
        return
    path = run.stages / f"{stage}.meeting.{place.meeting}"
    if place.rank:
        yield _read(path, wait_s)
        return
    for old in run.stages.glob(f"{stage}.meeting.*"):
        old.unlink(missing_ok=True)
    meeting = Meeting(decide(), place.name, free_port(place))
    publish(path, canonical_json(asdict(meeting)).encode())
    try:
        yield meeting
    finally:
        path.unlink(missing_ok=True)


def _read(path: Path, wait_s: float) -> Meeting:
    deadline = time.monotonic() + wait_s
    while True:
        try:
            return Meeting(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            if time.monotonic() > deadline:
                raise BadNodeError(
                    f"The first node of the job has published no {path} within {wait_s:.0f} s",
                    fix="Its log says why, unless this node does not see the same file system.",
                ) from None
        time.sleep(_PAUSE_S)


def ports(place: NodePlace) -> list[int]:
    """The ports that a try of a job may take, in order: other ones for another try, since
    processes of the last may still hold theirs."""
    first = 7 * place.job + place.restarts
    return [_FIRST_PORT + (first + _APART * number) % _PORTS for number in range(_TRIES)]


def free_port(place: NodePlace) -> int:
    """The first of them that nobody listens on here.

    Raises:
        BadNodeError: none is free.
    """
    candidates = ports(place)
    for port in candidates:
        try:
            dual = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if dual else socket.AF_INET
            socket.create_server(("", port), family=family, dualstack_ipv6=dual).close()
        except OSError:
            continue
        return port
    raise BadNodeError(
        f"None of the ports {', '.join(map(str, candidates))} is free on {place.name}",
        fix="`ss -ltnp` on that node shows who holds them.",
    )
