"""Models by their hub names: huggingface_hub itself, against a hub of our own on loopback."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from models import random_model, same_bits, write_vocab

from clue_ds import export
from clue_ds.export import hub
from clue_ds.model.weights import StateDict
from clue_ds.presets import NAMES, ModelConfig

CONFIG = ModelConfig(
    vocab_size=30,
    hidden_size=24,
    num_hidden_layers=1,
    num_attention_heads=3,
    intermediate_size=40,
    max_position_embeddings=16,
)
COMMIT = "c" * 40
TINY = "clue/roberta_chinese_clue_tiny"


class Hub(http.server.ThreadingHTTPServer):
    """Serves one directory under several names; `asked` says which files were fetched."""

    def __init__(self, names: set[str], directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.names, self.directory, self.asked = names, directory, set[str]()


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        parts = path.removeprefix("/api/models").strip("/").split("/")
        name = "/".join(parts[:2])
        if name not in self.server.names:
            self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif path.startswith("/api/models/"):
            self._api(name, parts[2:])
        else:
            self._file("/".join(parts[4:]))

    def _api(self, name: str, rest: list[str]) -> None:
        files = sorted(path.name for path in self.server.directory.iterdir())
        if rest[:1] == ["tree"]:
            tree = [
                {
                    "type": "file",
                    "path": file,
                    "size": (self.server.directory / file).stat().st_size,
                    "oid": "0" * 40,
                }
                for file in files
            ]
            self._send(200, json.dumps(tree).encode(), {})
            return
        siblings = [{"rfilename": file} for file in files]
        info = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "tags": []}
        self._send(200, json.dumps(info | {"private": False, "downloads": 0}).encode(), {})

    def _file(self, file: str) -> None:
        path = self.server.directory / file
        if not path.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        if self.command == "GET":
            self.server.asked.add(file)
        content = path.read_bytes()
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self._send(200, content, {"ETag": etag, "X-Repo-Commit": COMMIT})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def state() -> StateDict:
    return dict(random_model(CONFIG, 0).state_dict())


@pytest.fixture
def server(tmp_path: Path, state: StateDict) -> Iterator[Hub]:
    """A hub with one model, published as CLUE's are: its config says roberta."""
    vocab_file = write_vocab(tmp_path / "vocab.txt", CONFIG.vocab_size)
    directory = export.save(CONFIG, state, vocab_file, tmp_path / "published")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"model_type": "roberta"}))
    (directory / "modeling_evil.py").write_text("raise SystemExit")
    with Hub({TINY}, directory) as hub_server:
        thread = threading.Thread(target=hub_server.serve_forever)
        thread.start()
        yield hub_server
        hub_server.shutdown()
        thread.join()


def run(server: Hub, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A process of its own: huggingface_hub reads its environment once."""
    environment = {
        **{k: v for k, v in os.environ.items() if "proxy" not in k.lower()},
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, "-m", "clue_ds.cli", *arguments]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("name", "weights"),
    [(TINY, "model.safetensors"), ("roberta_tiny_clue", "pytorch_model.bin")],
)
def test_published_model_is_imported_by_name(
    name: str, weights: str, server: Hub, state: StateDict, tmp_path: Path
) -> None:
    if weights == "pytorch_model.bin":
        (server.directory / "model.safetensors").unlink()
    done = run(server, tmp_path, "import", name, "--output", "out")
    assert done.returncode == 0, done.stderr
    found = export.load(tmp_path / "out")[1]
    assert all(same_bits(found[key], tensor) for key, tensor in state.items())
    # One copy of the weights, no code, no card.
    assert server.asked == {"config.json", "tokenizer_config.json", "vocab.txt", weights}


def test_unknown_name_is_one_message(server: Hub, tmp_path: Path) -> None:
    done = run(server, tmp_path, "import", "clue/no_such_model", "--output", "out")
    assert done.returncode == 2
    assert "neither a directory nor a model on the hub" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_hub_that_cannot_be_reached_is_one_message(server: Hub, tmp_path: Path) -> None:
    server.socket.close()
    server.server_port = 9  # nobody listens there
    done = run(server, tmp_path, "import", TINY, "--output", "out")
    assert done.returncode == 2, done.stderr
    assert "can't fetch" in done.stderr and "Traceback" not in done.stderr


def test_names_of_published_models_are_presets_of_ours() -> None:
    assert set(hub.PUBLISHED) == {name for name in NAMES if name.startswith("roberta_")}


def test_path_is_never_taken_for_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    assert not hub.is_name("runs/mine")
    assert not hub.is_name("runs/misspelled")
    assert not hub.is_name("nowhere")
    assert not hub.is_name("a/b/c") and not hub.is_name("/a/b") and not hub.is_name("./a")
    assert hub.is_name(TINY)
