"""A judge behind an OpenAI-compatible endpoint on this machine, at which a test pulls the strings.

It counts what it is asked by row, holds rows back until the test lets them go, and kills whoever
asks about a poisonous row. The nodes of the development cluster share this machine's network, so
that tasks reach it, and the kernel tells which process is at the other end of a connection.
"""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.judge.endpoint import says, shown_answers
from tests.slurm.cluster import PATIENCE_S

ORDER = ("good", "fair", "bad")
_NEVER_S = 900.0


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed close their connections in any state."""


class JudgeServer:
    """Answers by quality: `good` beats `fair` beats `bad`; anything else is a tie."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        """Row → requests."""
        self.poison: set[str] = set()
        """Rows whose client is killed each time."""
        self._held: dict[str, threading.Event] = {}
        self._waiting: dict[str, int] = {}
        self._changed = threading.Condition()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                answer = server._answer(body, self.client_address[1])
                with suppress(OSError):
                    self.send_response(200)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(answer)))
                    self.end_headers()
                    self.wfile.write(answer)
                    return
                self.close_connection = True

            def log_message(self, *args: Any) -> None:
                pass

        self._http = _Server(("127.0.0.1", 0), Handler)
        self.port: int = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def settings(self, **more: Any) -> dict[str, Any]:
        """The `judge:` section of a run that asks here, one row at a time, once a row."""
        url = f"http://127.0.0.1:{self.port}/v1"
        return {"kind": "openai", "model": "m", "base_url": url, "concurrency": 1,
                "orders": "single", "max_retries": 0, "timeout_s": _NEVER_S, **more}  # fmt: skip

    def hold(self, rows: Iterable[str]) -> None:
        """Leave these rows without an answer until they are released."""
        for row in rows:
            self._held.setdefault(row, threading.Event())

    def release(self) -> None:
        """Answer everything that is held, and hold nothing any more."""
        held, self._held = self._held, {}
        for event in held.values():
            event.set()

    def clients(self, count: int, seconds: float = PATIENCE_S) -> dict[str, int]:
        """Row → process that waits for its answer, once `count` are held."""
        with self._changed:
            there = self._changed.wait_for(lambda: len(self._waiting) >= count, seconds)
            assert there, f"{len(self._waiting)} of {count} requests have come"
            return dict(self._waiting)

    def close(self) -> None:
        """Stop; requests that are held are answered."""
        self.release()
        self._http.shutdown()
        self._http.server_close()

    def _answer(self, body: dict[str, Any], port: int) -> bytes:
        text = str(body["messages"])
        found = re.search(r"Question (\w+)\?", text)
        row = found[1] if found else "?"
        with self._changed:
            self.asked[row] += 1
        if row in self.poison:
            os.kill(self._process_at(port), signal.SIGKILL)
        event = self._held.get(row)
        if event is not None:
            with self._changed:
                self._waiting[row] = self._process_at(port)
                self._changed.notify_all()
            event.wait(_NEVER_S)
            with self._changed:
                self._waiting.pop(row, None)
        reply = {"justification": "because", "winner": _winner(*shown_answers(body))}
        return json.dumps(says(json.dumps(reply)).body).encode()

    def _process_at(self, port: int) -> int:
        """The process whose socket has this port at its own end."""
        ends = f":{port:04X} "
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            local, remote = line.split()[1:3]
            if f"{local} ".endswith(ends) and remote.endswith(f":{self.port:04X}"):
                return _holder_of(line.split()[9])
        raise AssertionError(f"no connection from port {port}")


def _holder_of(inode: str) -> int:
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if str(descriptor.readlink()) == f"socket:[{inode}]":
                return int(descriptor.parts[2])
    raise AssertionError(f"nobody holds the socket {inode}")


def _winner(first: str, second: str) -> str:
    places = [ORDER.index(q) if (q := text.split()[0]) in ORDER else -1 for text in (first, second)]
    if -1 in places or places[0] == places[1]:
        return "tie"
    return "first" if places[0] < places[1] else "second"


@contextmanager
def judge_server() -> Iterator[JudgeServer]:
    """A server that is closed in any case."""
    server = JudgeServer()
    try:
        yield server
    finally:
        server.close()
