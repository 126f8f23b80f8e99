"""What a request hears that gets no result: one form for every error, and the gate before the app.

Guarantees: a refused request is answered with what was wrong, where, and what to do, as JSON
({"error": {"what", "where", "what_to_do"}}); no more of a body is kept than the limit, however the
client sends it; a slow client holds a connection for SECONDS_FOR_A_BODY and nothing else.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

SECONDS_FOR_A_BODY = 20.0
# A body up to this many times too large is read and thrown away: most clients read an answer only
# when they have sent everything, and would see a broken connection instead of the 413.
DISCARDED = 16


class Refusal(Exception):
    """A request that gets no result: status, and what its sender should know."""

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
    413: {"model": ErrorBody, "description": "more bytes, texts or characters than the limits"},
    422: {"model": ErrorBody, "description": "a field or a text that can't be used"},
    503: {"model": ErrorBody, "description": "the queue is full; see Retry-After"},
}


def add_refusals(app: FastAPI) -> None:
    """Answer every kind of error of `app` in the one form."""

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
        place = [str(part) for part in first["loc"] if part != "body"]
        if place[:1] == ["texts"]:  # without the names of the alternatives of a union
            place = place[:2]
        return Refusal(
            422,
            first["msg"],
            ".".join(place) or "body",
            "send a JSON object as application/json; /openapi.json has its fields",
        ).response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        path = request.url.path
        refused = Refusal(
            error.status_code, f"{error.detail}: {request.method} {path}", path,
            "see /openapi.json for what there is",
        )  # fmt: skip
        return JSONResponse(refused.content, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> JSONResponse:
        what = f"the server failed: {type(error).__name__}"
        return Refusal(500, what, request.url.path, "see the server's log").response()


Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Gate:
    """ASGI middleware: reads a whole body, within limits of size and time, and counts answers."""

    def __init__(self, app: Any, limit: int, statuses: Counter[tuple[str, int]]) -> None:
        self.app = app
        self.limit = limit
        self.statuses = statuses

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Only paths that exist, or a stranger could fill the memory with names.
                known = message["status"] not in (404, 405)
                self.statuses[scope["path"] if known else "other", message["status"]] += 1
            await send(message)

        try:
            body = await asyncio.wait_for(self._body(scope, receive), SECONDS_FOR_A_BODY)
        except asyncio.TimeoutError:
            refused = Refusal(
                408, f"no whole body in {SECONDS_FOR_A_BODY:.0f} s", "body", "send it faster"
            )
            await self._refuse(refused, scope, receive, counted)
        except Refusal as error:
            await self._refuse(error, scope, receive, counted)
        else:
            await self.app(scope, self._replay(body, receive), counted)

    async def _refuse(self, error: Refusal, scope: Message, receive: Receive, send: Send) -> None:
        # The rest of the body is not read, so the connection is of no use any more.
        error.headers["Connection"] = "close"
        await error.response()(scope, receive, send)

    async def _body(self, scope: Message, receive: Receive) -> bytes:
        """The whole body; Refusal when it is too large."""
        refused = Refusal(
            413,
            f"a body of more than {self.limit:,} bytes",
            "body",
            "send fewer or shorter texts in a request",
        )
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        most = DISCARDED * self.limit
        if declared.isdigit() and int(declared) > most:
            raise refused
        parts: list[bytes] = []
        size = 0
        while size <= most:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refusal(400, "the client left before its request was whole", "body", "")
            size += len(message.get("body", b""))
            if size <= self.limit:
                parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                break
        if size > self.limit:
            raise refused
        return b"".join(parts)

    @staticmethod
    def _replay(body: bytes, receive: Receive) -> Receive:
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        return replay
