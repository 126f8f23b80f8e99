"""Limits of the connections: how many, and how long a client may take to send a header.

Guarantees: a connection that sends no complete header within SECONDS_FOR_A_HEADER, or none that
follows on a kept connection, is closed, however slowly bytes arrive; there are never more than
`limit` connections, so the process never runs out of file descriptors; when all are taken, a new
connection replaces the one that has waited longest for its header, and is refused with 503 only
if every connection has a request in work. (uvicorn has a timeout only for idle kept connections,
and its `limit_concurrency` counts connections but keeps them open.)

Bodies have a limit of their own (http_errors.Gate).
"""

from __future__ import annotations

import asyncio
import resource
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

SECONDS_FOR_A_HEADER = 10.0
MAX_CONNECTIONS = 512
# asyncio accepts up to this many connections at once, before any of them is counted.
BACKLOG = 256
# File descriptors that are kept for other things: the model's files, sockets, the log.
RESERVED_DESCRIPTORS = 64

BUSY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\n"
TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\n"
END = b"Connection: close\r\nContent-Length: 0\r\n\r\n"


def most_connections() -> int:
    """MAX_CONNECTIONS, or fewer if this process may open fewer files (`ulimit -n`)."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(1, min(MAX_CONNECTIONS, soft - BACKLOG - RESERVED_DESCRIPTORS))


def protocol(limit: int, seconds: float = SECONDS_FOR_A_HEADER) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol with these limits, for the `http` of a uvicorn.Config."""
    base: Any = AutoHTTPProtocol
    # The connections that wait for a header, the one that has waited longest first.
    waiting: dict[Any, asyncio.TimerHandle] = {}

    class Limited(base):  # type: ignore[misc]
        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            if len(self.connections) > limit and not self._make_room():
                transport.write(BUSY + END)
                transport.close()
                return
            self._follow()

        def _make_room(self) -> bool:
            oldest = next(iter(waiting), None)
            if oldest is None:
                return False
            oldest._stop_waiting()
            oldest.connections.discard(oldest)
            oldest.transport.abort()
            return True

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._follow()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._follow()

        def connection_lost(self, error: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(error)

        def _follow(self) -> None:
            """Start the timer if a header is due, and stop it if a request is in work."""
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_waiting()
            elif self not in waiting and not self.transport.is_closing():
                waiting[self] = self.loop.call_later(seconds, self._end)

        def _stop_waiting(self) -> None:
            timer = waiting.pop(self, None)
            if timer is not None:
                timer.cancel()

        def _end(self) -> None:
            self._stop_waiting()
            if not self.transport.is_closing():
                self.transport.write(TOO_SLOW + END)
                self.transport.close()

    return Limited
