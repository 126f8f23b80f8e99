"""The HTTP API of `clue-ds serve`: its endpoints, the forms of requests and answers, the limits.

Guarantees: every request gets an answer; a refused one gets the reason (http_errors.py); a bad text
never affects the other requests in its batch; the event loop computes nothing, so the health
endpoints answer while the model works.

FastAPI's interactive pages load their scripts from another site, so they are turned off: `/` is our
own page, and /openapi.json describes the API.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ConfigDict, Field
from starlette.routing import Route

from clue_ds.errors import UserError
from clue_ds.tasks import records
from clue_ds.tasks.kinds import Example
from clue_ds.tasks.predict.command import text_of_record
from clue_ds.tasks.predict.predictor import MASK, NotFinite, Predictor, check_finite
from clue_ds.tasks.serve.batcher import Closed, Counters, Full
from clue_ds.tasks.serve.http_errors import REFUSALS, Gate, Refusal, add_refusals
from clue_ds.tasks.serve.metrics import Metrics

PAGE = Path(__file__).with_name("page.html")

Item = str | tuple[str, str] | dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """The largest request that is accepted."""

    body_bytes: int = 1 << 20
    texts: int = 64
    text_chars: int = 10_000  # of one text


class Queue(Protocol):
    """What the API submits texts to: a Batcher, or its rival in a benchmark."""

    @property
    def num_waiting(self) -> int: ...
    @property
    def counters(self) -> Counters: ...
    def submit(self, kind: Hashable, items: list[Any]) -> Future[list[Any]]: ...
    def close(self) -> None: ...


class Texts(BaseModel):
    """Texts, pairs of texts, or objects with the task's fields."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"texts": ["今天天气很好"]}]}
    )
    texts: list[Item] = Field(min_length=1)


class MaskedTexts(BaseModel):
    """Texts with [MASK] for each token to fill in."""

    model_config = ConfigDict(extra="forbid")
    texts: list[str] = Field(min_length=1)
    top_k: int = Field(5, ge=1, le=100)


class Class(BaseModel):
    """The most probable class of a text and the probability of every class."""

    label: str = Field(description="as the task's files write it")
    name: str | None = Field(None, description="what people read instead of the label")
    probabilities: dict[str, float]
    truncated: bool = Field(description="whether the model read only the beginning of the text")


class Predictions(BaseModel):
    """A class for each text, or of other kinds of tasks what `clue-ds predict` writes."""

    predictions: list[Class] | list[dict[str, Any]]


class Candidate(BaseModel):
    token: str
    probability: float


class Fillings(BaseModel):
    """For each text and each [MASK] in it, the most probable tokens."""

    fillings: list[list[list[Candidate]]]


class Embeddings(BaseModel):
    embeddings: list[list[float]]
    truncated: list[bool]


def compute(predictor: Predictor) -> Callable[[Hashable, list[Any]], Sequence[Any]]:
    """The function that the batcher's thread calls for each kind of request.

    A text with a mistake gets the UserError as its result, so the others of its batch are computed.
    """

    def fill(text: str, top_k: int) -> Any:
        try:
            return predictor.fill_mask(text, top_k)
        except UserError as error:
            return error

    def finite(answer: Any) -> Any:
        try:
            check_finite(answer, "this text")
        except UserError as error:
            return error
        return answer

    def answer(items: list[Any]) -> Sequence[Any]:
        encoded: list[Any] = []
        for item in items:
            try:
                encoded.append(predictor.encode_examples([Example(0, item, None)]))
            except UserError as error:
                encoded.append(error)
        good = [one for one in encoded if not isinstance(one, UserError)]
        raws = iter(predictor.raws([unit for one in good for unit in one.units]))
        found: list[Any] = []
        for one in encoded:
            if isinstance(one, UserError):
                found.append(one)
                continue
            own = [next(raws) for _ in one.units]
            try:
                (said,) = predictor.answers_of(one, own)
                found.append({**said.details, "truncated": one.truncated()[0]})
            except UserError as error:
                found.append(error)
        return found

    def run(kind: Hashable, items: list[Any]) -> Sequence[Any]:
        if isinstance(kind, tuple):
            return [fill(text, kind[1]) for text in items]
        if kind == "predict" and not predictor.classifies:
            return answer(items)
        encoded = predictor.encode(items)
        if kind == "predict":
            return [finite(prediction) for prediction in predictor.classify(encoded)]
        return [
            (finite(vector), feature.truncated)
            for vector, feature in zip(predictor.pool(encoded), encoded, strict=True)
        ]

    return run


def create_app(
    predictor: Predictor,
    waiting: Queue,
    limits: Limits = Limits(),
    hosts: frozenset[str] | None = None,
) -> FastAPI:
    """The service for a model. When it shuts down it closes `waiting`, which answers everything.

    `hosts`: the names that a request's Host header may have, beside those of loopback; None: any.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(waiting.close)

    app = FastAPI(
        title="clue_ds", version="1", lifespan=lifespan, docs_url=None, redoc_url=None,
        description=f"Predictions of the model {predictor.directory.name}.",
    )  # fmt: skip
    counted = Metrics(waiting)
    app.add_middleware(Gate, limit=limits.body_bytes, answered=counted.answered, hosts=hosts)
    add_refusals(app)
    _add_health(app, predictor, waiting, limits, counted)
    _add_answers(app, predictor, waiting, limits)
    counted.paths = frozenset(route.path for route in app.routes if isinstance(route, Route))
    return app


async def _ask(waiting: Queue, kind: Hashable, items: list[Any]) -> list[Any]:
    try:
        return await asyncio.wrap_future(waiting.submit(kind, items))
    except Full as error:
        raise Refusal(
            503,
            f"the server is overloaded: {error}",
            "server",
            f"send the request again in {error.retry_after} s",
            error.retry_after,
        ) from None
    except Closed as error:
        raise Refusal(503, str(error), "server", "send the request again", 1) from None


def _add_answers(app: FastAPI, predictor: Predictor, waiting: Queue, limits: Limits) -> None:
    @app.post("/predict", responses=REFUSALS)
    async def predict(body: Texts) -> Predictions:
        """The class of every text, or the answer of another kind of task, in order."""
        if predictor.kind is None:
            raise _wrong_model("/predict", "is not fine-tuned", "serve a fine-tuned model")
        texts = _texts(predictor, body.texts, limits)
        found = await _ask(waiting, "predict", texts)
        _refuse_errors(found)
        if not predictor.classifies:
            return Predictions.model_construct(predictions=found)
        return Predictions.model_construct(
            predictions=[
                Class.model_construct(**answer._asdict(), name=predictor.names.get(answer.label))
                for answer in found
            ]
        )

    @app.post("/embed", responses=REFUSALS)
    async def embed(body: Texts) -> Embeddings:
        """The embedding of every text (the mean of its token vectors), in order."""
        texts = _texts(predictor, body.texts, limits, embed=True)
        found = await _ask(waiting, "embed", texts)
        _refuse_errors([vector for vector, _ in found])
        return Embeddings.model_construct(
            embeddings=[vector.tolist() for vector, _ in found], truncated=[cut for _, cut in found]
        )

    @app.post("/fill-mask", responses=REFUSALS)
    async def fill_mask(body: MaskedTexts) -> Fillings:
        """The most probable tokens for every [MASK] of every text."""
        if not predictor.can_fill_mask:
            raise _wrong_model("/fill-mask", "has no MLM head", "serve a pretrained model")
        _check_sizes(body.texts, limits)
        for number, text in enumerate(body.texts):
            _checked(text, f"texts.{number}")
        found = await _ask(waiting, ("fill-mask", body.top_k), body.texts)
        _refuse_errors(found)
        return Fillings(
            fillings=[
                [
                    [Candidate(token=token, probability=p) for token, p in candidates]
                    for candidates in masks
                ]
                for masks in found
            ]
        )


def _refuse_errors(found: Sequence[Any]) -> None:
    """Answer with the first text that the model could not answer, if there is one."""
    for number, answer in enumerate(found):
        if isinstance(answer, NotFinite):
            raise Refusal(500, str(answer), f"texts.{number}", "serve another model")
        if isinstance(answer, UserError):
            raise Refusal(422, str(answer), f"texts.{number}", "correct this text")


def _wrong_model(where: str, what: str, what_to_do: str) -> Refusal:
    return Refusal(422, f"this model {what}", where, what_to_do)


def _texts(
    predictor: Predictor, items: list[Item], limits: Limits, embed: bool = False
) -> list[Any]:
    """The examples as the model reads them; a Refusal names the place of one that it can't read."""
    _check_sizes(items, limits)
    return [_text(predictor, item, f"texts.{number}", embed) for number, item in enumerate(items)]


def _text(predictor: Predictor, item: Item, where: str, embed: bool) -> Any:
    kind = predictor.kind
    if embed and not predictor.classifies:
        kind = None  # plain texts are embedded, whatever the task
    if isinstance(item, dict):
        try:
            item = text_of_record(predictor, item, where, embed)
        except UserError as error:
            what = str(error).removeprefix(f"{where}: ")
            raise Refusal(422, what, where, "give the fields of the task") from None
        if kind is not None and not predictor.classifies:
            return item
    elif kind is not None and kind.num_texts == 0:
        what = f"{kind.task.name or 'this model'} reads {', '.join(kind.task.fields)}"
        raise Refusal(422, what, where, "give an object with these fields")
    size = 2 if isinstance(item, tuple) else 1
    names_a_task = predictor.task is not None or not predictor.classifies
    if kind is not None and names_a_task and kind.num_texts not in (0, size):
        shape = "two texts, [first, second]" if kind.num_texts == 2 else "one text"
        name = kind.task.name or "this model"
        raise Refusal(422, f"{name} is about {shape}", where, f"give {shape}")
    if kind is None or predictor.classifies:
        return _checked(item, where)
    try:
        return kind.plain((item,) if isinstance(item, str) else tuple(item), where)
    except UserError as error:
        what = str(error).removeprefix(f"{where}: ")
        raise Refusal(422, what, where, "correct this text") from None


def _checked(item: Any, where: str) -> Any:
    try:
        return records.checked(item, where)
    except UserError as error:
        what = str(error).removeprefix(f"{where}: ")
        raise Refusal(422, what, where, "correct this text") from None


def _check_sizes(items: Sequence[Item], limits: Limits) -> None:
    if len(items) > limits.texts:
        raise Refusal(
            413, f"{len(items):,} texts", "texts", f"send at most {limits.texts:,} in a request"
        )
    for number, item in enumerate(items):
        fields = item.values() if isinstance(item, dict) else [item]
        size = max(map(_length, fields), default=0)
        if size > limits.text_chars:
            raise Refusal(
                413,
                f"a text of {size:,} characters",
                f"texts.{number}",
                f"send at most {limits.text_chars:,} characters per text",
            )


def _length(value: Any) -> int:
    """The characters of a text, or of all texts of a list (a pair, keywords)."""
    if isinstance(value, str):
        return len(value)
    return sum(map(_length, value)) if isinstance(value, list | tuple) else 0


def _add_health(
    app: FastAPI,
    predictor: Predictor,
    waiting: Queue,
    limits: Limits,
    counted: Metrics,
) -> None:
    page = PAGE.read_text(encoding="utf-8")

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
        return HTMLResponse(
            page, headers={"Content-Security-Policy": policy + "connect-src 'self'"}
        )

    @app.get("/health/live")
    async def live() -> dict[str, str]:
        """The process is running."""
        return {"status": "live"}

    @app.get("/health/ready")
    async def ready() -> dict[str, Any]:
        """The model is loaded: its name, task, endpoints and limits."""
        task, kind = predictor.task, predictor.kind
        return {
            "status": "ready",
            "model": predictor.directory.name,
            "task": task.name if task else None,
            "kind": kind.task.kind if kind and (task or not predictor.classifies) else None,
            "fields": list(kind.task.fields) if kind and kind.num_texts == 0 else None,
            "blank": kind.task.options.get("blank") if kind else None,
            "labels": predictor.labels,
            "names": predictor.names,
            "can": [
                *(["predict"] if predictor.kind is not None else []),
                *(["fill-mask"] if predictor.can_fill_mask else []),
                "embed",
            ],
            "mask": MASK,
            "max_length": predictor.max_length,
            "limits": vars(limits),
            "num_waiting": waiting.num_waiting,
        }

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counters, and the time of answers, in Prometheus' text format."""
        return Response(counted.text(), media_type=CONTENT_TYPE_LATEST)
