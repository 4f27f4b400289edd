"""As much of the Hugging Face Hub as a bank needs, in memory, on a port of this machine.

The client under test is the real one. Every file is a regular one: what the hub stores apart
(LFS, Xet) is between it and its client.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


class FakeHub(ThreadingHTTPServer):
    """Repositories by id; each has its branches, whether it is private, and what was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.branches: dict[str, dict[str, Files]] = {}
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.read_only = False
        self.asked: list[str] = []
        self.commits: list[tuple[str, str, str]] = []  # repository, branch, message

    def add(self, repo_id: str, folder: Path, **others: bytes) -> None:
        """Publish the files of a folder, and `others`, on the main branch."""
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.branches[repo_id] = {"main": files | others}

    def downloaded(self) -> list[str]:
        return sorted({path.rpartition("/")[2] for path in self.asked if "/resolve/" in path})


@contextmanager
def running() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


def commit_of(files: Files) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(path)
        if path.startswith("/api/models/"):
            _, _, _, org, name, *rest = path.split("/")
            self._describe(f"{org}/{name}", *rest)
        else:
            _, org, name, _, commit, file = path.split("/")
            self._send_file(f"{org}/{name}", commit, file)

    do_HEAD = do_GET  # noqa: N815 (the server looks for this name)

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if path == "/api/validate-yaml":
            self._json({})
        elif self.server.read_only:
            self._json({"error": "no right to write"}, 403)
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        else:
            _, _, _, org, name, action, branch = path.split("/", 6)
            getattr(self, f"_{action}")(f"{org}/{name}", branch, body)

    def _describe(self, repo_id: str, what: str = "revision", revision: str = "main") -> None:
        branches = self.server.branches.get(repo_id)
        if branches is None:
            return self._refuse(401, "RepoNotFound")
        if repo_id in self.server.gated:
            return self._refuse(403, "GatedRepo")
        files = branches.get(revision, self._at_commit(repo_id, revision))
        if files is None:
            return self._refuse(404, "RevisionNotFound")
        if what == "tree":
            return self._json(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
                    for name, content in files.items()
                ]
            )
        private = repo_id in self.server.private
        return self._json(
            {"id": repo_id, "sha": commit_of(files), "private": private, "siblings": []}
        )

    def _at_commit(self, repo_id: str, commit: str) -> Files | None:
        branches = self.server.branches[repo_id].values()
        return next((files for files in branches if commit_of(files) == commit), None)

    def _send_file(self, repo_id: str, commit: str, name: str) -> None:
        files = self._at_commit(repo_id, commit) or {}
        etag = hashlib.sha1(files[name]).hexdigest()
        self._send(200, files[name], {"X-Repo-Commit": commit, "ETag": f'"{etag}"'})

    def _create(self, asked: dict[str, object]) -> None:
        repo_id = f"{asked['organization']}/{asked['name']}"
        there_is = repo_id in self.server.branches
        if not there_is:
            self.server.branches[repo_id] = {"main": {}}
            # A client of version 1 says `private`, one of version 2 `visibility`.
            if asked.get("private") or asked.get("visibility") == "private":
                self.server.private.add(repo_id)
        self._json({"url": f"{self.server.address}/{repo_id}"}, 409 if there_is else 200)

    def _branch(self, repo_id: str, branch: str, body: bytes) -> None:
        branches = self.server.branches[repo_id]
        there_is = branch in branches
        branches.setdefault(branch, dict(branches["main"]))
        self._json({}, 409 if there_is else 200)

    def _preupload(self, repo_id: str, branch: str, body: bytes) -> None:
        modes = {"uploadMode": "regular", "shouldIgnore": False}
        names = [file["path"] for file in json.loads(body)["files"]]
        self._json({"files": [{"path": name, **modes} for name in names]})

    def _commit(self, repo_id: str, branch: str, body: bytes) -> None:
        header, *operations = (json.loads(line) for line in body.splitlines())
        files = dict(self.server.branches[repo_id][branch])
        for operation in operations:
            assert operation["key"] == "file"
            value = operation["value"]
            files[value["path"]] = base64.b64decode(value["content"])
        self.server.branches[repo_id][branch] = files
        self.server.commits.append((repo_id, branch, header["value"]["summary"]))
        commit = commit_of(files)
        url = f"{self.server.address}/{repo_id}/commit/{commit}"
        self._json({"commitUrl": url, "commitOid": commit, "success": True})

    def _refuse(self, status: int, code: str) -> None:
        self._json({"error": code}, status, {"X-Error-Code": code})

    def _json(
        self, content: object, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        self._send(status, json.dumps(content).encode(), headers or {})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Stay silent."""
