"""`clue-ds serve`: serve a model over HTTP, by default only to clients on this machine.

Guarantees: the address is printed once requests are accepted; on a loopback address, only requests
to that address by name or number are answered, so that a web page can't reach the model through a
host name of its own that it points to this machine (DNS rebinding); on TERM and INT the server
accepts no more connections, answers the requests in flight and exits. torch uses as many cores as
it would without the server (OMP_NUM_THREADS), because the event loop computes nothing and needs
little time.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from clue_ds.errors import UserError, check_least

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

    from clue_ds.tasks.predict.predictor import Predictor

# At shutdown, wait at most this long for clients to read their answers.
SECONDS_TO_DRAIN = 60


def serve(
    model: Path,
    task: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_batch: int = 32,
    max_wait_ms: float = 2.0,
    max_waiting: int = 1024,
    max_length: int | None = None,
    body_bytes: int = 1 << 20,
    texts: int = 64,
    text_chars: int = 10_000,
    allowed_hosts: tuple[str, ...] = (),
) -> None:
    """Serve a model over HTTP: /predict, /fill-mask, /embed, and a page at / to try them.

    Args:
        model: a run directory, one of its checkpoints, a Hugging Face directory, or a zip of one.
        task: the task of a classifier: a task of CLUE or a YAML file; default the one that the
            model was fine-tuned for.
        host: address to listen on. There is no password: with any address but loopback, everyone
            who can reach the port can use the model.
        port: TCP port; 0 chooses a free one.
        max_batch: most texts in a batch.
        max_wait_ms: how long a request may wait for others to share its batch.
        max_waiting: most texts in the queue; further requests get 503 and Retry-After.
        max_length: most tokens to read of a text; default the length that the model was
            fine-tuned with.
        body_bytes: most bytes in the body of a request.
        texts: most texts in a request.
        text_chars: most characters in a text.
        allowed_hosts: further names under which clients call the server (their Host header), such
            as the one that a proxy passes on. On loopback, localhost and loopback addresses are
            always allowed; on another address, all names are, unless this option lists some.
    """
    check_installed()
    import uvicorn

    # Imported here, because `--help` needs no torch.
    from clue_ds.tasks.predict.predictor import Predictor
    from clue_ds.tasks.serve.app import Limits, compute, create_app
    from clue_ds.tasks.serve.batcher import Batcher

    limits = Limits(body_bytes, texts, text_chars)
    for name, value in {
        **vars(limits), "max_batch": max_batch, "max_waiting": max_waiting
    }.items():  # fmt: skip
        check_least(f"--{name.replace('_', '-')}", value, 1)
    if max_wait_ms < 0:
        raise UserError(f"--max-wait-ms {max_wait_ms} must not be negative")
    with bind(host, port) as listener:
        predictor = Predictor(model, task, max_batch, max_length)
        batcher = Batcher(compute(predictor), max_batch, max_wait_ms / 1000, max_waiting)
        app = create_app(predictor, batcher, limits, _hosts(listener, host, allowed_hosts))
        settings = server_config(app)
        listener.listen(settings.backlog)
        _announce(listener, predictor)
        uvicorn.Server(settings).run(sockets=[listener])


def server_config(app: FastAPI) -> uvicorn.Config:
    """uvicorn's settings for the service, with the limits of its connections."""
    import uvicorn

    from clue_ds.tasks.serve import connections

    return uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=SECONDS_TO_DRAIN,
        http=connections.protocol(connections.most_connections()),
        ws="none",
        backlog=connections.BACKLOG,
    )


def _is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def _hosts(listener: socket.socket, host: str, allowed: tuple[str, ...]) -> frozenset[str] | None:
    """The names that a Host header may have beside those of loopback; None: any name."""
    if not _is_loopback(listener) and not allowed:
        return None
    return frozenset({host, *allowed})


def check_installed() -> None:
    """Raise a UserError if the packages of the [serve] extra are missing."""
    needed = ("fastapi", "uvicorn", "prometheus_client")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"serving needs {' and '.join(missing)}; install with: pip install 'clue_ds[serve]'"
        )


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to that address.

    Called before the model is loaded, so that a port in use is reported at once.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # asyncio turns Nagle's algorithm off only for sockets whose protocol is set to TCP. With it
        # each answer would wait 40 ms for the client's delayed acknowledgement.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"can't listen on {host} port {port}: {error}; give another --host or --port"
        ) from None
    return listener


def _announce(listener: socket.socket, predictor: Predictor) -> None:
    host, port = listener.getsockname()[:2]
    if not _is_loopback(listener):
        print(
            f"clue-ds serve: WARNING: {host} can be reached from other machines, and there is no "
            "password and no encryption; put a proxy that has both in front of the server",
            file=sys.stderr,
        )
    shown = f"[{host}]" if ":" in host else host
    task = f", task {predictor.task.name}" if predictor.task else ""
    print(
        f"serving {predictor.directory.name}{task} at http://{shown}:{port}   (Ctrl-C to stop)",
        flush=True,
    )
