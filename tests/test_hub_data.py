"""CLUE's tasks by `--data hub`: `datasets` itself, against a hub of our own on loopback."""

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
from urllib.parse import parse_qs

import pytest
from models import write_vocab

from clue_ds.data import Corpus

COMMIT = "d" * 40
ROWS = [
    {"sentence1": "甲", "sentence2": "乙", "label": 1, "idx": 0},
    {"sentence1": "丙", "sentence2": "丁", "label": -1, "idx": 1},
    {"sentence1": "戊", "sentence2": "己", "label": 0, "idx": 2},
]
CARD = """---
configs:
- config_name: cmnli
  data_files:
  - split: train
    path: cmnli/train-*
---
"""


class Handler(http.server.BaseHTTPRequestHandler):
    """The few requests that `datasets` makes of a repository of parquet files."""

    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length).decode()
        # huggingface_hub sends a form, or JSON.
        asked = json.loads(body)["paths"] if body[0] == "{" else parse_qs(body)["paths"]
        found = [entry for entry in self._tree() if entry["path"] in asked]
        self._send(200, json.dumps(found).encode(), {})

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if "/datasets/clue/clue" not in path:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif path.startswith("/api/") and "/tree/" in path:
            folder = path.split("/tree/")[1].partition("/")[2]
            inside = folder + "/" if folder else ""
            entries = [e for e in self._tree() if str(e["path"]).startswith(inside)]
            if "recursive=true" not in self.path.lower():
                entries = [e for e in entries if "/" not in str(e["path"])[len(inside) :]]
            self._send(200, json.dumps(entries).encode(), {})
        elif path.startswith("/api/"):
            siblings = [{"rfilename": entry["path"]} for entry in self._tree() if entry["size"]]
            info = {"id": "clue/clue", "sha": COMMIT, "siblings": siblings, "tags": []}
            more = {"private": False, "downloads": 0, "gated": False, "disabled": False}
            self._send(200, json.dumps(info | more).encode(), {})
        else:
            self._file(path.split("/resolve/")[1].partition("/")[2])

    def _tree(self) -> list[dict[str, object]]:
        root = self.server.directory
        return [
            {
                "type": "file" if path.is_file() else "directory",
                "path": str(path.relative_to(root)),
                "size": path.stat().st_size if path.is_file() else 0,
                "oid": "0" * 40,
            }
            for path in sorted(root.rglob("*"))
        ]

    def _file(self, name: str) -> None:
        path = self.server.directory / name
        if not path.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
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


class Hub(http.server.ThreadingHTTPServer):
    def __init__(self, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.directory = directory


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Hub]:
    import datasets

    directory = tmp_path / "published"
    (directory / "cmnli").mkdir(parents=True)
    # The hub's order of CMNLI's classes, which is not ours.
    label = datasets.ClassLabel(names=["neutral", "entailment", "contradiction"])
    text = datasets.Value("string")
    features = datasets.Features(
        {"sentence1": text, "sentence2": text, "label": label, "idx": datasets.Value("int32")}
    )
    rows = datasets.Dataset.from_list(ROWS, features=features)
    rows.to_parquet(str(directory / "cmnli" / "train-00000-of-00001.parquet"))
    (directory / "README.md").write_text(CARD, encoding="utf-8")
    with Hub(directory) as hub:
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


def run(server: Hub, tmp_path: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    """A process of its own: huggingface_hub reads its environment once."""
    environment = {
        **{k: v for k, v in os.environ.items() if "proxy" not in k.lower()},
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "0",
        "HF_DATASETS_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)


def read(server: Hub, tmp_path: Path, task: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import json, sys; from clue_ds.errors import run_command;"
        "from clue_ds.tasks import hub_data, registry\n"
        "def show():\n"
        f"    found = hub_data.read(registry.get({task!r}), 'train')\n"
        "    print(json.dumps([list(found), found.num_skipped, found.sha256]))\n"
        "sys.exit(run_command('read', show))"
    )
    return run(server, tmp_path, [sys.executable, "-c", code])


def test_a_task_is_read_with_its_labels_by_name(server: Hub, tmp_path: Path) -> None:
    done = read(server, tmp_path, "cmnli")
    assert done.returncode == 0, done.stderr
    found, num_skipped, digest = json.loads(done.stdout)
    assert found == [[0, ["甲", "乙"], "entailment"], [2, ["戊", "己"], "neutral"]]
    assert num_skipped == 1 and len(digest) == 64


def test_a_task_that_the_hub_lacks_is_one_message(server: Hub, tmp_path: Path) -> None:
    done = read(server, tmp_path, "afqmc")
    assert done.returncode == 2
    assert "can't fetch afqmc" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["hf:clue/clue:cmnli:train", "hf:clue/clue"])
def test_a_data_set_of_the_hub_becomes_a_corpus(server: Hub, tmp_path: Path, name: str) -> None:
    vocab = write_vocab(tmp_path / "vocab.txt", 30)
    verb = [sys.executable, "-m", "clue_ds.cli", "shard", name, "--text-field", "sentence1"]
    done = run(server, tmp_path, [*verb, "--vocab", str(vocab), "--output", "corpus"])
    assert done.returncode == 0, done.stderr
    assert Corpus(tmp_path / "corpus").num_documents == 3


def test_a_data_set_that_the_hub_lacks_is_one_message(server: Hub, tmp_path: Path) -> None:
    vocab = write_vocab(tmp_path / "vocab.txt", 30)
    verb = [sys.executable, "-m", "clue_ds.cli", "shard", "hf:nobody/nothing", "--vocab"]
    done = run(server, tmp_path, [*verb, str(vocab), "--output", "corpus"])
    assert done.returncode == 2, done.stderr
    assert "data set hf:nobody/nothing can't be opened" in done.stderr
    assert "Traceback" not in done.stderr
