"""A hub of one machine: the few endpoints that downloading a snapshot asks, over folders on disk, on 127.0.0.1.

Every request is recorded, so that a test can say what was downloaded and what was not. `break_after` cuts the
connection once in the middle of a file, as networks do.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repo:
    """folders: commit -> folder of files. refs: branch or tag -> commit. closed: an error code for whoever asks."""

    folders: dict[str, Path]
    refs: dict[str, str]
    closed: str | None = None


@dataclass
class FakeHub:
    """What the server serves and has seen. log: (method, path, Range header or None)."""

    repos: dict[str, Repo] = field(default_factory=dict)
    log: list[tuple[str, str, str | None]] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    """The Authorization headers that came."""
    break_after: int | None = None
    """The next file longer than this ends after so many bytes."""
    url: str = ""

    def add(self, repo_id: str, folder: Path, revision: str = "main", **kwargs: Any) -> str:
        """Serve `folder` as a new commit of `repo_id`, and as what `revision` points to. Returns the commit."""
        commit = hashlib.sha1(f"{repo_id}{folder}".encode()).hexdigest()
        repo = self.repos.setdefault(repo_id, Repo({}, {}, **kwargs))
        repo.folders[commit], repo.refs[revision] = folder, commit
        return commit

    def downloads(self) -> list[str]:
        """Names of the files whose content was asked for, in order."""
        paths = [path for how, path, _ in self.log if how == "GET" and "/resolve/" in path]
        return [path.split("/resolve/")[1].partition("/")[2] for path in paths]


@contextmanager
def serve_hub() -> Iterator[FakeHub]:
    """A running server; it and its threads are gone afterwards."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = False
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            return

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            hub.tokens.add(self.headers.get("Authorization"))
            hub.log.append((self.command, path, self.headers.get("Range")))
            is_api = path.startswith("api/models/")
            repo_id, _, rest = path.removeprefix("api/models/").partition(
                next((f"/{word}/" for word in ("revision", "tree", "resolve") if f"/{word}/" in path), "\0")
            )
            repo = hub.repos.get(repo_id)
            if repo is None:
                return self._refuse(404, "RepoNotFound")
            if repo.closed is not None:
                return self._refuse(403, repo.closed)
            revision, _, name = rest.partition("/")
            commit = repo.refs.get(revision, revision)
            if commit not in repo.folders:
                return self._refuse(404, "RevisionNotFound")
            if is_api:
                return self._describe(repo_id, commit, repo.folders[commit], "/tree/" in path)
            return self._send_file(commit, repo.folders[commit] / name)

        def _refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", f"refused: {code}")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _describe(self, repo_id: str, commit: str, folder: Path, as_tree: bool) -> None:
            files = sorted(file for file in folder.rglob("*") if file.is_file())
            tree = [
                {"type": "file", "path": f.relative_to(folder).as_posix(), "size": f.stat().st_size, "oid": _etag(f)}
                for f in files
            ]
            info = {"_id": "0", "id": repo_id, "sha": commit, "siblings": [{"rfilename": f["path"]} for f in tree]}
            body = json.dumps(tree if as_tree else info).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _send_file(self, commit: str, file: Path) -> None:
            if not file.is_file():
                return self._refuse(404, "EntryNotFound")
            data, start = file.read_bytes(), 0
            total = len(data)
            if self.command == "GET" and (asked := self.headers.get("Range")):
                start = int(asked.removeprefix("bytes=").split("-")[0])
                data = data[start:]
            self.send_response(206 if start else 200)
            self.send_header("ETag", f'"{_etag(file)}"')
            self.send_header("X-Repo-Commit", commit)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(data)))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
            self.end_headers()
            if self.command == "HEAD":
                return
            if hub.break_after is not None and len(data) > hub.break_after:
                data, hub.break_after = data[: hub.break_after], None
                self.close_connection = True
            self.wfile.write(data)

    return Handler


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
