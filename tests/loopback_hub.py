"""A Hugging Face hub of our own on loopback: the requests that huggingface_hub and datasets make.

Whoever has TOKEN may make repositories and commit to them. What it does not do: pages of a listing,
large files, other authentication.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs

COMMIT = "c" * 40
TOKEN = "hf_loopback"


class Hub(http.server.ThreadingHTTPServer):
    """Serves directories by "models/owner/name" and "datasets/owner/name".

    `asked`: the files that were fetched.
    """

    def __init__(self, repositories: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.asked = repositories, set[str]()
        self.uploads: Path | None = None  # where repositories are made
        self.private: dict[str, bool] = {}

    def run(
        self, folder: Path, *command: str | Path, token: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in `folder` with this hub as the hub; its cache lies there too.

        A process of its own, because huggingface_hub reads its environment once.
        """
        environment = {
            **{k: v for k, v in os.environ.items() if "proxy" not in k.lower()},
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}",
            "HF_HOME": str(folder / "cache"),
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            **({} if token is None else {"HF_TOKEN": token}),
        }
        words = [sys.executable, *map(str, command)]
        return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)


@contextlib.contextmanager
def serving(repositories: dict[str, Path]) -> Iterator[Hub]:
    """A hub that answers as long as the block lasts."""
    with Hub(repositories) as hub:
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


class Handler(http.server.BaseHTTPRequestHandler):
    """/api/KIND/OWNER/NAME/..., /OWNER/NAME/resolve/REVISION/FILE, the same after /datasets."""

    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        repository, rest = self._place()
        if repository not in self.server.repositories:
            self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif not self.path.startswith("/api/"):
            self._file(self.server.repositories[repository], "/".join(rest[2:]))
        elif rest[:1] == ["tree"]:
            self._tree(repository, "/".join(rest[2:]))
        else:
            self._about(repository)

    def do_POST(self) -> None:
        """paths-info (about some paths only), and what a commit takes."""
        repository, rest = self._place()
        body = self._body().decode()
        place = self.path.removeprefix("/api/").split("?")[0]
        if place == "validate-yaml":
            self._send(200, b'{"errors": [], "warnings": []}', {})
            return
        if place == "repos/create" or rest[:1] in (["preupload"], ["commit"]):
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self._send(401, b"{}", {})
            else:
                self._write(repository, place, rest, body)
            return
        # huggingface_hub sends a form, or JSON.
        asked = json.loads(body)["paths"] if body[0] == "{" else parse_qs(body)["paths"]
        found = [e for e in self._entries(repository) if e["path"] in asked]
        self._send(200, json.dumps(found).encode(), {})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _write(self, repository: str, place: str, rest: list[str], body: str) -> None:
        """Make a repository, say how its files are to be sent (inside the commit), or commit."""
        address = f"http://127.0.0.1:{self.server.server_port}"
        if place == "repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.server.private[name] = asked.get("visibility") == "private" or bool(
                asked.get("private")
            )
            folder = Path(tempfile.mkdtemp(dir=self.server.uploads))
            self.server.repositories.setdefault(f"models/{name}", folder)
            answer: dict[str, object] = {"url": f"{address}/{name}", "name": name}
        elif rest[0] == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            answer = {"files": files}
        else:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    target = self.server.repositories[repository] / line["value"]["path"]
                    target.write_bytes(base64.b64decode(line["value"]["content"]))
            name = repository.partition("/")[2]
            url = f"{address}/{name}/commit/{COMMIT}"
            answer = {"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""}
        self._send(200, json.dumps(answer).encode(), {})

    def _place(self) -> tuple[str, list[str]]:
        """("models/owner/name" or "datasets/...", the parts of the path after it)."""
        parts = self.path.split("?")[0].removeprefix("/api").strip("/").split("/")
        if parts[0] not in ("models", "datasets"):
            parts.insert(0, "models")
        # Names of before the hub had owners, such as bert-base-chinese.
        size = 2 if "/".join(parts[:2]) in self.server.repositories else 3
        return "/".join(parts[:size]), parts[size:]

    def _entries(self, repository: str) -> list[dict[str, object]]:
        root = self.server.repositories[repository]
        return [
            {
                "type": "file" if path.is_file() else "directory",
                "path": str(path.relative_to(root)),
                "size": path.stat().st_size if path.is_file() else 0,
                "oid": "0" * 40,
            }
            for path in sorted(root.rglob("*"))
        ]

    def _tree(self, repository: str, folder: str) -> None:
        inside = folder + "/" if folder else ""
        found = [e for e in self._entries(repository) if str(e["path"]).startswith(inside)]
        if "recursive=true" not in self.path.lower():
            found = [e for e in found if "/" not in str(e["path"])[len(inside) :]]
        self._send(200, json.dumps(found).encode(), {})

    def _about(self, repository: str) -> None:
        name = repository.partition("/")[2]
        files = [e["path"] for e in self._entries(repository) if e["type"] == "file"]
        siblings = [{"rfilename": file} for file in files]
        info = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "tags": []}
        more = {"private": False, "downloads": 0, "gated": False, "disabled": False}
        self._send(200, json.dumps(info | more).encode(), {})

    def _file(self, root: Path, name: str) -> None:
        path = root / name
        if not path.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        if self.command == "GET":
            self.server.asked.add(name)
        content = path.read_bytes()
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self._send(200, content, {"ETag": etag, "X-Repo-Commit": COMMIT})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        pass
