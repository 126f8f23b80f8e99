"""The service over a real socket: answers, refusals, back-pressure, a shutdown that loses none."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import clue_ds.export as export
from clue_ds.errors import UserError
from clue_ds.tasks import Predictor
from clue_ds.tasks.serve import command
from clue_ds.tasks.serve.batcher import Batcher, Closed, Full

httpx = pytest.importorskip("httpx")
uvicorn = pytest.importorskip("uvicorn")
service = pytest.importorskip("clue_ds.tasks.serve.app")

from prometheus_client.parser import text_string_to_metric_families  # noqa: E402
from test_predict import TEXTS, WORDS, finetuned, pretrained, vocab_file  # noqa: E402, F401

from clue_ds.tasks.serve import connections  # noqa: E402

LIMITS = service.Limits(body_bytes=4_000, texts=4, text_chars=50)


class Running:
    """A service in this process, on a port of its own."""

    def __init__(self, directory: Path, limited: Any = None, **options: Any) -> None:
        predictor = Predictor(directory)
        self.batcher = Batcher(service.compute(predictor), **options)
        app = service.create_app(predictor, self.batcher, LIMITS, frozenset({"model.example"}))
        self.listener = command.bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        settings = command.server_config(app)
        if limited is not None:
            settings.http = limited
        self.server = uvicorn.Server(settings)
        self.thread = threading.Thread(target=self.server.run, args=([self.listener],))
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture(scope="module")
def classifier(finetuned: Path) -> Iterator[Running]:  # noqa: F811
    running = Running(finetuned, max_wait_s=0.05)
    yield running
    running.close()


def test_answers_equal_the_predictors_in_order(classifier: Running, finetuned: Path) -> None:  # noqa: F811
    texts = [text for text in TEXTS if text] + [["今天", "天气很好"]]
    expected = Predictor(finetuned).predict([t if isinstance(t, str) else tuple(t) for t in texts])

    def ask(text: Any) -> Any:
        found = httpx.post(f"{classifier.url}/predict", json={"texts": [text]}, timeout=30)
        assert found.status_code == 200, found.text
        return found.json()["predictions"][0]

    before = classifier.batcher.counters.num_batches
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, texts * 8))
    for answer, right in zip(answers, expected * 8, strict=True):
        assert answer["label"] == right.label
        assert answer["probabilities"] == pytest.approx(right.probabilities, abs=1e-5)
    # Requests that arrive together are computed together.
    assert classifier.batcher.counters.num_batches - before < len(answers)


@pytest.mark.parametrize(
    ("path", "body", "status", "where", "what"),
    [
        ("/predict", b'{"texts": [', 400, "body", "not JSON"),
        ("/predict", b'{"text": ["a"]}', 422, "texts", "required"),
        ("/predict", b'{"texts": []}', 422, "texts", "at least 1"),
        ("/predict", b'{"texts": [3]}', 422, "texts.0", "string"),
        ("/predict", '{"texts": ["好", " "]}'.encode(), 422, "texts.1", "empty"),
        ("/predict", b'{"texts": ["a", "\\ud800"]}', 422, "texts.1", "half a character"),
        ("/predict", b'{"texts": [{"x": 1}]}', 422, "texts.0", "no field"),
        ("/predict", b'{"texts": ["a", "a", "a", "a", "a"]}', 413, "texts", "5 texts"),
        ("/predict", b'{"texts": ["' + b"a" * 51 + b'"]}', 413, "texts.0", "51 characters"),
        ("/predict", b'{"texts": ["' + b"a" * 5_000 + b'"]}', 413, "body", "4,000 bytes"),
        ("/predict", b'{"texts": ["' + b"a" * 500_000 + b'"]}', 413, "body", "4,000 bytes"),
        ("/fill-mask", b'{"texts": ["[MASK]"]}', 422, "/fill-mask", "no MLM head"),
        ("/nowhere", b"{}", 404, "/nowhere", "Not Found"),
    ],
)
def test_refusals_say_what_where_and_what_to_do(
    path: str, body: bytes, status: int, where: str, what: str, classifier: Running
) -> None:
    headers = {"content-type": "application/json"}
    found = httpx.post(f"{classifier.url}{path}", content=body, headers=headers, timeout=30)
    assert found.status_code == status, found.text
    error = found.json()["error"]
    assert error["where"].startswith(where) and what in error["what"] and error["what_to_do"]


def test_health_metrics_page_and_openapi(classifier: Running) -> None:
    assert httpx.get(f"{classifier.url}/health/live").json() == {"status": "live"}
    ready = httpx.get(f"{classifier.url}/health/ready").json()
    assert ready["labels"] == ["坏", "中", "好"] and ready["can"] == ["predict", "embed"]
    httpx.get(f"{classifier.url}/nowhere")
    metrics = httpx.get(f"{classifier.url}/metrics")
    assert metrics.headers["content-type"].startswith("text/plain; version=")
    found = {
        sample.name: sample.value
        for family in text_string_to_metric_families(metrics.text)
        for sample in family.samples
        if sample.labels.get("path", "other") == "other"
    }
    assert found["clue_ds_responses_total"] >= 1
    assert found["clue_ds_request_seconds_count"] == found["clue_ds_responses_total"]
    assert found["clue_ds_batches_total"] == classifier.batcher.counters.num_batches
    assert 'path="/nowhere"' not in metrics.text and 'path="/health/ready"' in metrics.text
    page = httpx.get(classifier.url).text
    assert not re.search(r"""(src|href)=["'](https?:)?//""", page), "loads something from elsewhere"
    paths = httpx.get(f"{classifier.url}/openapi.json").json()["paths"]
    assert {"/predict", "/embed", "/fill-mask"} <= set(paths)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("127.0.0.1", 200),
        ("[::1]:80", 200),
        ("Model.Example.:443", 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("10.0.0.1:8000", 421),
        ("", 421),
    ],
)
def test_a_page_elsewhere_does_not_reach_the_model_by_its_own_name(
    host: str, status: int, classifier: Running
) -> None:
    """DNS rebinding: the browser asks 127.0.0.1 and names the attacker's host."""
    for path in ("/health/live", "/"):
        found = httpx.get(f"{classifier.url}{path}", headers={"Host": host})
        assert found.status_code == status
    if status == 421:
        assert "not called" in httpx.get(classifier.url, headers={"Host": host}).text


def unfinished(running: Running) -> socket.socket:
    client = socket.create_connection(running.listener.getsockname())
    client.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
    return client


def test_unfinished_headers_leave_the_service_reachable(finetuned: Path) -> None:  # noqa: F811
    """1,015 of them took all file descriptors, and no other client was answered for 70 s."""
    running = Running(finetuned, limited=connections.protocol(limit=8))
    clients = []
    try:
        for _ in range(4):
            clients += [unfinished(running) for _ in range(10)]
            assert httpx.get(f"{running.url}/health/live", timeout=30).status_code == 200
            assert len(running.server.server_state.connections) <= 8
        # The newest ones are still open and may finish.
        clients[-1].sendall(b"x\r\n\r\n")
        assert clients[-1].recv(1000).startswith(b"HTTP/1.1 200")
    finally:
        for client in clients:
            client.close()
        running.close()


def test_a_header_that_does_not_end_is_ended(finetuned: Path) -> None:  # noqa: F811
    running = Running(finetuned, limited=connections.protocol(limit=8, seconds=0.3))
    try:
        with unfinished(running) as client:
            assert client.recv(1000).startswith(b"HTTP/1.1 408")
            assert client.recv(1000) == b""
        with socket.create_connection(running.listener.getsockname()) as client:
            # A second request on a kept connection has the same limit.
            client.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\nGET /h")
            heard = b""
            while block := client.recv(1000):
                heard += block
            assert heard.startswith(b"HTTP/1.1 200") and b"HTTP/1.1 408" in heard
    finally:
        running.close()


def test_requests_in_work_are_never_replaced(finetuned: Path) -> None:  # noqa: F811
    running = Running(finetuned, limited=connections.protocol(limit=2), max_wait_s=3.0)
    body = {"texts": ["今天"]}
    try:
        with ThreadPoolExecutor(2) as pool:
            asked = [
                pool.submit(httpx.post, f"{running.url}/predict", json=body, timeout=60)
                for _ in range(2)
            ]
            while running.batcher.num_waiting < 2:
                time.sleep(0.01)
            with socket.create_connection(running.listener.getsockname()) as client:
                assert client.recv(1000).startswith(b"HTTP/1.1 503")
            assert [each.result().status_code for each in asked] == [200, 200]
    finally:
        running.close()


def test_an_answer_that_is_not_finite_names_its_text(pretrained: Path, tmp_path: Path) -> None:  # noqa: F811
    config, state = export.load(pretrained)
    name = "bert.embeddings.word_embeddings.weight"
    rows = state[name].clone()
    rows[WORDS.index("湖")] = 3e38
    state |= {name: rows, "cls.predictions.decoder.weight": rows}
    directory = export.save(config, state, pretrained / "vocab.txt", tmp_path / "model")
    running = Running(directory)
    try:
        # The word's vector is a row of the MLM head, too, so that head answers no text at all.
        for path, texts, where in (
            ("/embed", ["今天", "湖"], "texts.1"),
            ("/fill-mask", ["[MASK]"], "texts.0"),
        ):
            found = httpx.post(f"{running.url}{path}", json={"texts": texts}, timeout=30)
            error = found.json()["error"]
            assert found.status_code == 500 and error["where"] == where
            assert "is NaN or infinite" in error["what"]
        found = httpx.post(f"{running.url}/embed", json={"texts": ["今天"]}, timeout=30)
        assert found.status_code == 200
    finally:
        running.close()


def test_fill_mask_and_embed(pretrained: Path) -> None:  # noqa: F811
    running = Running(pretrained)
    try:
        body = {"texts": ["今天天气[MASK]好", "[MASK]们"], "top_k": 2}
        found = httpx.post(f"{running.url}/fill-mask", json=body).json()["fillings"]
        for text, masks in zip(body["texts"], found, strict=True):
            expected = Predictor(pretrained).fill_mask(text, 2)
            tokens = [[candidate["token"] for candidate in mask] for mask in masks]
            assert tokens == [[token for token, _ in mask] for mask in expected]
        wrong = httpx.post(f"{running.url}/fill-mask", json={"texts": ["[MASK]", "今天"]})
        assert wrong.status_code == 422 and wrong.json()["error"]["where"] == "texts.1"
        answer = httpx.post(f"{running.url}/embed", json={"texts": ["今天", "好" * 40]}).json()
        assert answer["truncated"] == [False, True] and len(answer["embeddings"][0]) == 24
        refused = httpx.post(f"{running.url}/predict", json={"texts": ["好"]})
        assert refused.status_code == 422 and "not fine-tuned" in refused.text
    finally:
        running.close()


def test_a_full_queue_refuses_at_once_and_answers_what_it_took() -> None:
    free = threading.Event()

    def slow(kind: Any, items: list[Any]) -> list[Any]:
        free.wait(30)
        return [item * 2 for item in items]

    batcher = Batcher(slow, max_batch=2, max_wait_s=0, max_waiting=6)
    taken = [batcher.submit("x", [i, i + 1]) for i in range(3)]
    with pytest.raises(Full) as refused:
        batcher.submit("x", [9])
    assert refused.value.retry_after >= 1
    free.set()
    batcher.close()
    assert [future.result() for future in taken] == [[0, 2], [2, 4], [4, 6]]
    with pytest.raises(Closed):
        batcher.submit("x", [1])


def test_a_full_service_says_when_to_come_back(finetuned: Path) -> None:  # noqa: F811
    running = Running(finetuned, max_wait_s=0.5, max_waiting=2)
    body = {"texts": ["今天天气很好"]}
    try:
        with ThreadPoolExecutor(12) as pool:
            asked = [
                pool.submit(httpx.post, f"{running.url}/predict", json=body, timeout=30)
                for _ in range(12)
            ]
            answers = [each.result() for each in asked]
    finally:
        running.close()
    refused = [answer for answer in answers if answer.status_code == 503]
    assert refused and len(refused) + sum(a.status_code == 200 for a in answers) == 12
    assert all(int(answer.headers["Retry-After"]) >= 1 for answer in refused)
    assert "queue" in refused[0].json()["error"]["what"]


def test_a_failure_reaches_only_the_requests_that_were_computed_with_it() -> None:
    def fail(kind: Any, items: list[Any]) -> list[Any]:
        if kind == "bad":
            raise RuntimeError("broken")
        return items

    batcher = Batcher(fail, max_wait_s=0.05)
    bad, good = batcher.submit("bad", [1]), batcher.submit("good", [2])
    assert good.result(30) == [2]
    with pytest.raises(RuntimeError, match="broken"):
        bad.result(30)
    assert batcher.submit("good", [3]).result(30) == [3]
    batcher.close()


def test_verb_ends_on_term_and_answers_everything_in_flight(finetuned: Path) -> None:  # noqa: F811
    command = [sys.executable, "-m", "clue_ds.cli", "serve", "--model", str(finetuned)]
    command += ["--port", "0", "--max-wait-ms", "4000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stderr is not None
        match = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
        assert match, process.stderr.read()
        with ThreadPoolExecutor(6) as pool:
            body = json.dumps({"texts": ["今天"]})
            futures = [
                pool.submit(
                    httpx.post, f"{match[0]}/predict", content=body, timeout=60,
                    headers={"content-type": "application/json"},
                )
                for _ in range(6)
            ]  # fmt: skip
            for _ in range(150):
                if "clue_ds_texts_waiting 6" in httpx.get(f"{match[0]}/metrics").text:
                    break
                time.sleep(0.02)
            else:
                pytest.fail("six requests did not arrive within the batcher's wait")
            process.send_signal(signal.SIGTERM)
            assert [future.result().status_code for future in futures] == [200] * 6
        assert process.wait(timeout=60) in (0, -signal.SIGTERM)
        assert "WARNING" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()


def test_answers_do_not_wait_for_acknowledgements() -> None:
    """asyncio leaves Nagle's algorithm on, 40 ms an answer, for a socket of protocol 0."""
    with command.bind("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP


def test_a_taken_port_is_one_message() -> None:
    with command.bind("127.0.0.1", 0) as listener:
        listener.listen()
        with pytest.raises(UserError, match="can't listen on 127.0.0.1 port"):
            command.bind("127.0.0.1", listener.getsockname()[1])
