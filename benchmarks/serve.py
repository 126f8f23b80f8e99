"""`clue-ds bench serve`: requests per second of a service, against transformers' pipeline.

All contenders use the same FastAPI service with the same limits and answers, each in its own
process: ours batches requests in its queue, while the peers call a `transformers`
text-classification pipeline for each request, on a pool of threads or on one thread. They get the
same model and the same texts in the same order, one text per request. Labels are compared before
anything is timed. The contenders take turns round by round, so that other load on the machine
affects all of them.

Closed loop: `clients` connections, each of which sends its next request after an answer. Overload:
every contender gets requests at twice our best rate, and must answer each one with 200 or 503.
Everything stays on 127.0.0.1 and ends by itself after `rounds` x `requests`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clue_ds.benchmarks.description import write_results
from clue_ds.errors import UserError, existing_file

if TYPE_CHECKING:
    from clue_ds.tasks import Predictor

CONTENDERS = {
    "clue_ds": "batcher",
    "pipeline, 40 threads": "40",  # FastAPI's default for blocking handlers
    "pipeline, 1 thread": "1",
}
CHILD = (
    "import sys; from clue_ds.benchmarks.serve import serve_contender; "
    "serve_contender(*sys.argv[1:])"
)
SECONDS_FOR_AN_ANSWER = 60


def serve(
    model: Path,
    text: Path,
    output: Path | None = None,
    requests: int = 300,
    rounds: int = 3,
    clients: tuple[int, ...] = (1, 8, 32),
) -> None:
    """Compare `clue-ds serve` with a transformers pipeline behind the same FastAPI service.

    Args:
        model: a fine-tuned directory whose task takes one text.
        text: JSON lines with the field "sentence", one per request.
        output: JSON file for the figures, with device, versions and command.
        requests: requests of each contender in each round.
        rounds: rounds for each number of clients; the contenders take turns.
        clients: connections that send at the same time.
    """
    texts = _texts(text, requests)
    with contextlib.ExitStack() as stack:
        ports = {n: stack.enter_context(_running(model, kind)) for n, kind in CONTENDERS.items()}
        _check_labels(ports, texts)
        figures = _measure(ports, texts, rounds, clients)
    _print(figures)
    if output is not None:
        write_results(output, figures)


def _texts(path: Path, count: int) -> list[str]:
    lines = existing_file(path, "texts").read_text(encoding="utf-8").splitlines()[:count]
    texts = [json.loads(line)["sentence"] for line in lines if line.strip()]
    if not texts:
        raise UserError(f"{path} has no texts; give JSON lines with the field sentence")
    return texts


class PipelineQueue:
    """The peer instead of our Batcher: every request calls the pipeline by itself."""

    num_waiting = 0

    def __init__(self, model: str, num_threads: int, predictor: Predictor) -> None:
        import transformers

        from clue_ds.tasks.serve.batcher import Counters

        self.counters = Counters()
        self._pool = ThreadPoolExecutor(num_threads)
        tokenizer = transformers.BertTokenizer.from_pretrained(model)
        self._pipeline = transformers.pipeline(
            "text-classification", model=model, tokenizer=tokenizer, top_k=None
        )
        self._options = {"truncation": True, "max_length": predictor.max_length}
        # The pipeline answers with the names of classes, where they have some.
        self._labels = {name: label for label, name in predictor.names.items()}

    def submit(self, kind: object, items: list[Any]) -> Future[list[Any]]:
        return self._pool.submit(self._run, items)

    def _run(self, items: list[str]) -> list[Any]:
        from clue_ds.tasks.predict.predictor import Prediction

        found: Any = self._pipeline(items, **self._options)
        named = [[(self._labels.get(e["label"], e["label"]), e["score"]) for e in r] for r in found]
        return [Prediction(row[0][0], dict(row)) for row in named]

    def close(self) -> None:
        self._pool.shutdown()


def serve_contender(model: str, kind: str) -> None:
    """Serve one contender on a free port and print the port; the child process runs this."""
    import uvicorn

    from clue_ds.tasks import Predictor
    from clue_ds.tasks.serve.app import compute, create_app
    from clue_ds.tasks.serve.batcher import Batcher
    from clue_ds.tasks.serve.command import bind

    predictor = Predictor(model)
    waiting: Batcher | PipelineQueue
    if kind == "batcher":
        waiting = Batcher(compute(predictor))
    else:
        waiting = PipelineQueue(model, int(kind), predictor)
    with bind("127.0.0.1", 0) as listener:
        listener.listen(1024)
        print(f"port {listener.getsockname()[1]}", flush=True)
        app = create_app(predictor, waiting)
        uvicorn.Server(uvicorn.Config(app, log_level="error")).run(sockets=[listener])


@contextlib.contextmanager
def _running(model: Path, kind: str) -> Iterator[int]:
    """Run a contender for the duration of the block; yields its port."""
    command = [sys.executable, "-c", CHILD, str(model), kind]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if match := re.match(r"port (\d+)", line):
                yield int(match[1])
                break
        else:
            raise UserError(f"the contender {kind} did not start; see its message above")
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Connection:
    """HTTP/1.1 over one kept connection. A client library would need more time than the service."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def __aenter__(self) -> Connection:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()

    async def post(self, text: str) -> tuple[int, bytes]:
        """Status and body of the answer to one text."""
        body = json.dumps({"texts": [text]}).encode()
        head = (
            "POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        self.writer.write(head.encode() + body)
        answer = await self.reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", answer, re.IGNORECASE)
        assert length, answer
        return int(answer.split(b" ", 2)[1]), await self.reader.readexactly(int(length[1]))


async def _closed_loop(port: int, texts: Sequence[str], clients: int) -> dict[str, Any]:
    """Send all texts over `clients` connections; seconds (in all, of each), statuses, labels."""
    waiting = iter(enumerate(texts))
    seconds: list[float] = []
    statuses: Counter[int] = Counter()
    labels: dict[int, str] = {}

    async def client() -> None:
        async with Connection(port) as connection:
            for number, text in waiting:
                begin = time.perf_counter()
                status, body = await asyncio.wait_for(connection.post(text), SECONDS_FOR_AN_ANSWER)
                seconds.append(time.perf_counter() - begin)
                statuses[status] += 1
                if status == 200:
                    labels[number] = json.loads(body)["predictions"][0]["label"]

    begin = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    total = time.perf_counter() - begin
    return {"total": total, "seconds": seconds, "statuses": statuses, "labels": labels}


async def _at_rate(port: int, texts: Sequence[str], rate: float) -> Counter[int]:
    """Send texts at a fixed rate without waiting for answers; return the answers' statuses."""
    statuses: Counter[int] = Counter()

    async def one(number: int, text: str) -> None:
        await asyncio.sleep(number / rate)
        async with Connection(port) as connection:
            status, _ = await asyncio.wait_for(connection.post(text), SECONDS_FOR_AN_ANSWER)
        statuses[status] += 1

    await asyncio.gather(*(one(number, text) for number, text in enumerate(texts)))
    return statuses


def _check_labels(ports: dict[str, int], texts: Sequence[str]) -> None:
    """Assert that all contenders give every text the same label; this also warms them up."""
    found = {n: asyncio.run(_closed_loop(port, texts, 8))["labels"] for n, port in ports.items()}
    ours = found["clue_ds"]
    for name, labels in found.items():
        wrong = [i for i in range(len(texts)) if labels.get(i) != ours.get(i)]
        assert len(ours) == len(texts) and not wrong, f"{name} differs from clue_ds on {wrong[:5]}"


def _measure(
    ports: dict[str, int], texts: Sequence[str], rounds: int, clients: Sequence[int]
) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "benchmark": "serve",
        "num_requests": len(texts),
        "rounds": rounds,
        "mean_characters": round(float(np.mean([len(text) for text in texts])), 1),
        "same_labels": True,
        "clients": {},
    }
    best = 0.0
    for count in clients:
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ports}
        for _ in range(rounds):
            for name, port in ports.items():
                runs[name].append(asyncio.run(_closed_loop(port, texts, count)))
        rows = {name: _summary(each, len(texts)) for name, each in runs.items()}
        rates = {name: row["requests_per_second"] for name, row in rows.items()}
        peer = max(rate for name, rate in rates.items() if name != "clue_ds")
        best = max(best, rates["clue_ds"])
        figures["clients"][str(count)] = {
            "contenders": rows,
            "ratio_to_the_better_peer": round(rates["clue_ds"] / peer, 2),
        }
    rate = 2 * best
    overload = {n: asyncio.run(_at_rate(port, texts, rate)) for n, port in ports.items()}
    figures["overload"] = {
        "requests_per_second": round(rate),
        "answers": {n: {str(s): c for s, c in sorted(a.items())} for n, a in overload.items()},
    }
    for name, answers in overload.items():
        assert answers.total() == len(texts), f"{name} left requests without an answer"
    return figures


def _summary(runs: Sequence[dict[str, Any]], num_requests: int) -> dict[str, Any]:
    """The median rate over rounds, and percentiles over all requests of all rounds."""
    seconds = np.concatenate([run["seconds"] for run in runs])
    p50, p99 = np.percentile(seconds, [50, 99])
    num_answers = sum(run["statuses"].total() for run in runs)
    return {
        "requests_per_second": round(
            float(np.median([num_requests / run["total"] for run in runs])), 1
        ),
        "milliseconds_p50": round(1e3 * p50, 1),
        "milliseconds_p99": round(1e3 * p99, 1),
        "num_unanswered": num_requests * len(runs) - num_answers,
        "num_refused": num_answers - sum(run["statuses"][200] for run in runs),
    }


def _print(figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("clients", "contender", "requests/s", "p50 ms", "p99 ms", "without an answer")
    for count, entry in figures["clients"].items():
        for name, row in entry["contenders"].items():
            table.add_row(
                count,
                name,
                f"{row['requests_per_second']:,.0f}",
                f"{row['milliseconds_p50']:.1f}",
                f"{row['milliseconds_p99']:.1f}",
                str(row["num_unanswered"]),
            )
    console = Console()
    console.print(table)
    for count, entry in figures["clients"].items():
        ratio = entry["ratio_to_the_better_peer"]
        console.print(f"{count} clients: clue_ds answers {ratio} times as many as the better peer")
    console.print(f"overload: {figures['overload']}")
