"""Models named on ModelScope: its own library against a server of ours on loopback."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from models import TINY_CONFIG, random_model, same_bits, write_vocab

from clue_ds import export
from clue_ds.errors import UserError
from clue_ds.export import hub

pytest.importorskip("modelscope_hub", reason="ModelScope's library is in the [modelscope] extra")

NAME, TOKEN = "we/bert-tiny", "ms-loopback"


class Handler(http.server.BaseHTTPRequestHandler):
    """/api/v1/models/ORG/NAME/repo/files, which lists, and /repo?FilePath=, which downloads."""

    server: Server

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        place = parts.path.removeprefix("/api/v1/models/")
        root = self.server.repositories.get("/".join(place.split("/")[:2]))
        if root is None:
            self._send(404, {"Code": 10010205001, "Message": "no such model", "Success": False})
        elif place.endswith("/repo/files"):
            files = [
                {
                    "Path": path.name,
                    "Name": path.name,
                    "Type": "blob",
                    "Size": path.stat().st_size,
                    "Sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                }
                for path in sorted(root.iterdir())
            ]
            self._send(200, {"Code": 200, "Success": True, "Data": {"Files": files}})
        else:
            (name,) = parse_qs(parts.query)["FilePath"]
            self.server.asked.add(name)
            self._send(200, (root / name).read_bytes())

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """Make a repository, say where large files go, or commit."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        place = self.path.removeprefix("/api/v1/")
        data: dict[str, object] = {}
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(401, {"Code": 401, "Message": "who are you?", "Success": False})
            return
        if place == "models":
            name = f"{body['Path']}/{body['Name']}"
            made = self.server.uploads / name
            made.mkdir(parents=True, exist_ok=True)
            self.server.made.setdefault(name, body)
            self.server.repositories.setdefault(name, made)
        elif place.endswith("objects/batch"):
            address = f"http://127.0.0.1:{self.server.server_port}/put/"
            data["objects"] = [
                {**one, "actions": {"upload": {"href": address + one["oid"]}}}
                for one in body["objects"]
            ]
        else:
            root = self.server.repositories["/".join(place.split("/")[2:4])]
            self.server.num_commits += 1
            for action in body["actions"]:
                inline = base64.b64decode(action["content"])
                content = self.server.blobs[action["sha256"]] if action["type"] == "lfs" else inline
                (root / action["path"]).write_bytes(content)
        self._send(200, {"Code": 200, "Success": True, "Data": data})

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.blobs[self.path.rpartition("/")[2]] = content
        self._send(200, b"")

    def _send(self, status: int, content: dict[str, object] | bytes) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    """Serves directories by "ORG/NAME". `asked`: the files that were fetched."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.asked = dict[str, Path](), set[str]()
        self.made, self.blobs = dict[str, dict[str, object]](), dict[str, bytes]()
        self.uploads, self.num_commits = Path(), 0

    def run(
        self, folder: Path, *arguments: str, token: str = ""
    ) -> subprocess.CompletedProcess[str]:
        environment = {
            **{k: v for k, v in os.environ.items() if "proxy" not in k.lower()},
            "MODELSCOPE_ENDPOINT": f"http://127.0.0.1:{self.server_port}",
            "MODELSCOPE_CACHE": str(folder / "cache"),
            "MODELSCOPE_HOME": str(folder / "home"),
            "MODELSCOPE_API_TOKEN": token,
        }
        words = [sys.executable, "-m", "clue_ds.cli", *arguments]
        return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def test_a_model_is_imported_by_its_name_on_modelscope(server: Server, tmp_path: Path) -> None:
    state = dict(random_model(TINY_CONFIG, 0).state_dict())
    vocab_file = write_vocab(tmp_path / "vocab.txt", TINY_CONFIG.vocab_size)
    there = export.save(TINY_CONFIG, state, vocab_file, tmp_path / "there", legacy=True)
    (there / "modeling_evil.py").write_text("raise SystemExit")
    server.repositories[NAME] = there
    done = server.run(tmp_path, "import", f"modelscope:{NAME}", "--output", "out")
    assert done.returncode == 0, done.stderr
    found = export.load(tmp_path / "out")[1]
    assert all(same_bits(found[key], tensor) for key, tensor in state.items())
    # One copy of the weights, no code, no card.
    tokenizer = {"tokenizer_config.json", "tokenizer.json", "vocab.txt"}
    assert server.asked == {"config.json", "model.safetensors", *tokenizer}
    done = server.run(tmp_path, "import", "modelscope:we/nothing", "--output", "out2")
    assert done.returncode == 2, done.stderr
    assert "ModelScope has no model we/nothing" in done.stderr and "Traceback" not in done.stderr


def test_a_model_is_published_on_modelscope_and_loaded_from_there(
    server: Server, tmp_path: Path
) -> None:
    state = dict(random_model(TINY_CONFIG, 0).state_dict())
    vocab_file = write_vocab(tmp_path / "vocab.txt", TINY_CONFIG.vocab_size)
    model = export.save(TINY_CONFIG, state, vocab_file, tmp_path / "mine")
    server.uploads = tmp_path / "published"
    words = ("push", str(model), NAME, "--to", "modelscope", "--private")
    done = server.run(tmp_path, *words)
    assert done.returncode == 2 and "ModelScope refuses the token" in done.stderr, done.stderr
    done = server.run(tmp_path, *words, token=TOKEN)
    assert done.returncode == 0, done.stderr
    assert server.made[NAME]["Visibility"] == 1 and server.made[NAME]["License"] == "Other"
    assert server.num_commits == 1
    there = server.repositories[NAME]
    assert {path.name for path in there.iterdir()} == {path.name for path in model.iterdir()}
    card = (there / "README.md").read_text(encoding="utf-8")
    assert f"# {NAME}" in card and f'HubApi().download_repo("{NAME}", "model")' in card
    assert "from_pretrained(directory)" in card and "mine" not in card
    done = server.run(tmp_path, "import", f"modelscope:{NAME}", "--output", "out", token=TOKEN)
    assert done.returncode == 0, done.stderr
    found = export.load(tmp_path / "out")[1]
    assert all(same_bits(found[key], tensor) for key, tensor in state.items())


def test_only_org_and_name_is_a_name_there() -> None:
    assert hub.is_name(f"modelscope:{NAME}")
    for wrong in ("modelscope:bert", "modelscope:a/b/c", "modelscope:../b"):
        with pytest.raises(UserError, match="is no name on ModelScope; give modelscope:ORG/NAME"):
            hub.download(wrong)
