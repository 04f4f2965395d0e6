"""A hub on this machine that gives out repositories: as much of its HTTP as downloads use.

Switch off Xet (HF_HUB_DISABLE_XET=1) in the process that downloads.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePath
from typing import Any
from urllib.parse import unquote

_API = re.compile(r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)(?P<rest>/.*)?")
_FILE = re.compile(
    r"/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<file>.+)"
)


@dataclass
class Repository:
    """Files under one commit."""

    files: dict[str, bytes]
    gated: bool = False
    commit: str = "c" * 40
    branch: str = "main"


@dataclass
class Hub:
    """Repositories by `models/name` and `datasets/name`, and what was asked."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    url: str = ""
    downloads: list[str] = field(default_factory=list)
    """Paths of files that were sent, from their beginning."""
    tokens: set[str] = field(default_factory=set)
    break_after: int | None = None
    """End a download after this many bytes, once."""

    def listing(self, repository: Repository) -> list[dict[str, Any]]:
        """Files and directories, as the tree endpoints give them."""
        folders = {str(parent) for name in repository.files for parent in PurePath(name).parents}
        files = [
            {"type": "file", "path": name, "size": len(data), "oid": _etag(data)}
            for name, data in repository.files.items()
        ]
        return files + [
            {"type": "directory", "path": folder, "oid": repository.commit}
            for folder in sorted(folders - {"."})
        ]


def _etag(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if token := self.headers.get("Authorization"):
            self.hub.tokens.add(token)
        path = unquote(self.path.partition("?")[0])
        if found := _API.fullmatch(path):
            self._api(found, body)
        elif found := _FILE.fullmatch(path):
            self._file(found)
        else:
            self._json(404, {"error": path})

    do_HEAD = do_POST = do_GET  # noqa: N815

    def _repository(self, kind: str, name: str) -> Repository | None:
        repository = self.hub.repositories.get(f"{kind}/{name}")
        if repository is None:
            self._json(401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return repository

    def _api(self, found: re.Match[str], body: bytes) -> None:
        repository = self._repository(found["kind"], found["name"])
        if repository is None:
            return
        rest = found["rest"] or ""
        listing = self.hub.listing(repository)
        if rest.startswith("/tree/"):
            folder = rest.split("/", 3)[3] if rest.count("/") > 2 else "."
            inside = [e for e in listing if self._lies_in(folder, e["path"])]
            self._json(200 if inside else 404, inside, _entry_error(not inside))
        elif rest.startswith("/paths-info/"):
            wanted = json.loads(body)["paths"] if body.startswith(b"{") else _form(body)
            self._json(200, [entry for entry in listing if entry["path"] in wanted])
        elif rest and rest != f"/revision/{repository.branch}" and repository.commit not in rest:
            self._json(404, {"error": "no revision"}, {"X-Error-Code": "RevisionNotFound"})
        else:
            files = [entry for entry in listing if entry["type"] == "file"]
            siblings = [{"rfilename": e["path"], "size": e["size"]} for e in files]
            facts = {"id": found["name"], "sha": repository.commit, "private": False}
            self._json(200, {**facts, "siblings": siblings, "tags": []})

    def _lies_in(self, folder: str, path: str) -> bool:
        parents = list(map(str, PurePath(path).parents))
        deep = "recursive=true" in self.path.lower()
        return folder in parents if deep else folder == parents[0]

    def _file(self, found: re.Match[str]) -> None:
        kind = "datasets" if found["kind"] else "models"
        repository = self._repository(kind, found["name"])
        if repository is None:
            return
        data = repository.files.get(found["file"])
        if data is None:
            self._json(404, {"error": "no entry"}, _entry_error(True))
            return
        if repository.gated and "Authorization" not in self.headers:
            self._json(401, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
            return
        start = int((self.headers.get("Range") or "bytes=0-")[6:].partition("-")[0])
        headers = {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": repository.commit}
        headers["Accept-Ranges"] = "bytes"
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        elif self.command == "GET":
            self.hub.downloads.append(found["file"])
        self._send(206 if start else 200, data[start:], headers)

    def _json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), headers or {})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        limit = self.hub.break_after
        if limit is not None and len(data) > limit:
            self.hub.break_after = None
            self.wfile.write(data[:limit])
            self.close_connection = True
            return
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


def _form(body: bytes) -> list[str]:
    return [unquote(v.partition("=")[2]) for v in body.decode().split("&") if v.startswith("paths")]


def _entry_error(absent: bool) -> dict[str, str]:
    return {"X-Error-Code": "EntryNotFound"} if absent else {}


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve a hub; its `url` is an HF_ENDPOINT."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
