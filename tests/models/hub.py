"""A stand-in for the Hugging Face Hub on the loopback: of its API what huggingface_hub uses to load a model."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT, OLDER = "c0ffee" + "0" * 34, "0dd" + "0" * 37
API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?")
FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Hub:
    """What it has, what goes wrong, and what was asked for."""

    models: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """The files of each repository, at all revisions the same: `main` and COMMIT, `v1` and OLDER."""
    gated: set[str] = field(default_factory=set)
    breaks_at: dict[str, int] = field(default_factory=dict)
    """Bytes after which the connection ends when a file is loaded for the first time."""
    failing: set[str] = field(default_factory=set)
    """Files that the server fails to give."""
    loaded: list[tuple[str, str | None]] = field(default_factory=list)
    """Files of which the bytes were asked for, and the header Range."""
    address: str = ""


def handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", length: int | None = None, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            self.end_headers()
            self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if request := API.fullmatch(path):
                self.describe(*request.groups())
            elif request := FILE.fullmatch(path):
                self.give(*request.groups())
            else:
                self.answer(404)

        def describe(self, name: str, revision: str | None) -> None:
            commit = {None: COMMIT, "main": COMMIT, COMMIT: COMMIT, "v1": OLDER, OLDER: OLDER}.get(revision)
            if name not in hub.models:
                self.answer(404, X_Error_Code="RepoNotFound")
            elif commit is None:
                self.answer(404, X_Error_Code="RevisionNotFound")
            else:
                siblings = [{"rfilename": file} for file in hub.models[name]]
                model = {"id": name, "sha": commit, "siblings": siblings}
                self.answer(200, json.dumps(model).encode(), Content_Type="application/json")

        def give(self, name: str, commit: str, file: str) -> None:
            if name in hub.gated:
                return self.answer(403, X_Error_Code="GatedRepo")
            data = hub.models[name][file]
            headers = {"ETag": f'"{oid(data)}"', "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
            if self.command == "HEAD":
                return self.answer(200, length=len(data), **headers)
            wanted = self.headers.get("Range")
            hub.loaded.append((file, wanted))
            if file in hub.failing:
                return self.answer(500)
            if file in hub.breaks_at:
                return self.answer(200, data[: hub.breaks_at.pop(file)], length=len(data), **headers)
            if wanted is None:
                return self.answer(200, data, **headers)
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            return self.answer(206, data[start:], **headers)

    return Handler


def oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()
    with ThreadingHTTPServer(("127.0.0.1", 0), handler_of(hub)) as server:
        hub.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield hub
        server.shutdown()
        thread.join()
