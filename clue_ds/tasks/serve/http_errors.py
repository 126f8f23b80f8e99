"""HTTP errors: one JSON form for all of them, and the middleware that limits request bodies.

Guarantees: the answer to a refused request states what was wrong, where, and what to do
({"error": {"what", "where", "what_to_do"}}); no more of a body than the limit is kept in memory,
however the client sends it; a slow client occupies one connection, for at most SECONDS_FOR_A_BODY.
"""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

SECONDS_FOR_A_BODY = 20.0
# A body of up to this many times the limit is read to its end and discarded. Most clients read the
# answer only after sending everything, and would see a broken connection instead of the 413.
MAX_DISCARDED = 16


class Refusal(Exception):
    """An error answer: its status, and what the client needs to know."""

    def __init__(
        self, status: int, what: str, where: str, what_to_do: str, retry_after: int | None = None
    ) -> None:
        super().__init__(what)
        self.status = status
        self.content = {"error": {"what": what, "where": where, "what_to_do": what_to_do}}
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}

    def response(self) -> JSONResponse:
        return JSONResponse(self.content, self.status, self.headers)


class Error(BaseModel):
    what: str
    where: str
    what_to_do: str


class ErrorBody(BaseModel):
    error: Error


REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "the body is not JSON"},
    421: {"model": ErrorBody, "description": "the Host header names another server"},
    413: {"model": ErrorBody, "description": "more bytes, texts or characters than allowed"},
    422: {"model": ErrorBody, "description": "a field or a text is invalid"},
    503: {"model": ErrorBody, "description": "the queue is full; see Retry-After"},
}


def add_refusals(app: FastAPI) -> None:
    """Give the answers to all errors of `app` the same form."""

    @app.exception_handler(Refusal)
    async def refusal(request: Request, error: Refusal) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            where = f"body, character {first['loc'][-1]}"
            what = f"not JSON: {first.get('ctx', {}).get('error', first['msg'])}"
            return Refusal(400, what, where, "send a JSON object").response()
        place = [str(step) for step in first["loc"] if step != "body"]
        if place[:1] == ["texts"]:  # drop pydantic's names of the types that an item may have
            place = place[:2]
        return Refusal(
            422,
            first["msg"],
            ".".join(place) or "body",
            "send a JSON object as application/json; /openapi.json lists its fields",
        ).response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        path = request.url.path
        refused = Refusal(
            error.status_code, f"{error.detail}: {request.method} {path}", path,
            "see /openapi.json for the paths and methods",
        )  # fmt: skip
        return JSONResponse(refused.content, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> JSONResponse:
        what = f"the server failed: {type(error).__name__}"
        return Refusal(500, what, request.url.path, "see the server's log").response()


def host_name(header: str) -> str:
    """The host in a Host header, without port and brackets, in lower case."""
    host = header.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].removesuffix(".")


def is_loopback(host: str) -> bool:
    """Whether a name or address can only mean the machine itself."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Gate:
    """ASGI middleware: checks the Host, reads bodies within size and time, reports answers.

    `answered`: called with path, status and seconds at the end of every answer.
    """

    def __init__(
        self,
        app: Any,
        limit: int,
        answered: Callable[[str, int, float], None],
        hosts: frozenset[str] | None = None,
    ) -> None:
        self.app = app
        self.hosts = hosts
        self.limit = limit
        self.answered = answered

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        began, status = time.perf_counter(), 0

        async def counted(message: Message) -> None:
            nonlocal status
            await send(message)
            if message["type"] == "http.response.start":
                status = message["status"]
            elif not message.get("more_body", False):
                self.answered(scope["path"], status, time.perf_counter() - began)

        try:
            self._check_host(scope)
            body = await asyncio.wait_for(self._body(scope, receive), SECONDS_FOR_A_BODY)
        except asyncio.TimeoutError:
            refused = Refusal(
                408, f"no complete body after {SECONDS_FOR_A_BODY:.0f} s", "body", "send it faster"
            )
            await self._refuse(refused, scope, receive, counted)
        except Refusal as error:
            await self._refuse(error, scope, receive, counted)
        else:
            await self.app(scope, self._replay(body, receive), counted)

    def _check_host(self, scope: Message) -> None:
        """Raise a Refusal if the request is for another host; see `serve/command.py`."""
        if self.hosts is None:
            return
        for name in [value for key, value in scope["headers"] if key == b"host"]:
            host = host_name(name.decode("latin-1"))
            if host not in self.hosts and not is_loopback(host):
                raise Refusal(
                    421,
                    f"this server is not called {host[:100]!r}",
                    "the Host header",
                    "call it by its address, or start it with --allowed-hosts and this name",
                )

    async def _refuse(self, error: Refusal, scope: Message, receive: Receive, send: Send) -> None:
        # The rest of the body stays unread, so the connection can't be used again.
        error.headers["Connection"] = "close"
        await error.response()(scope, receive, send)

    async def _body(self, scope: Message, receive: Receive) -> bytes:
        """The whole body; a Refusal if it is too large."""
        refused = Refusal(
            413,
            f"a body of more than {self.limit:,} bytes",
            "body",
            "send fewer or shorter texts per request",
        )
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        most = MAX_DISCARDED * self.limit
        if declared.isdigit() and int(declared) > most:
            raise refused
        chunks: list[bytes] = []
        size = 0
        while size <= most:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refusal(400, "the client disconnected before the end of the body", "body", "")
            size += len(message.get("body", b""))
            if size <= self.limit:
                chunks.append(message.get("body", b""))
            if not message.get("more_body", False):
                break
        if size > self.limit:
            raise refused
        return b"".join(chunks)

    @staticmethod
    def _replay(body: bytes, receive: Receive) -> Receive:
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        return replay
