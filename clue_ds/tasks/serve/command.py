"""`clue-ds serve`: a model behind HTTP, on this machine only unless told otherwise.

Guarantees: the address is printed when requests are taken; TERM and INT stop taking connections,
answer everything in flight and end. torch takes the cores that it would take alone
(OMP_NUM_THREADS): the event loop computes nothing and needs little of one.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import socket
import sys
from pathlib import Path

from clue_ds.errors import UserError
from clue_ds.tasks.predict.predictor import Predictor

# After this many seconds a client that doesn't read its answer is left.
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
) -> None:
    """Answer requests over HTTP: /predict, /fill-mask, /embed, and a page to try them at /.

    Args:
        model: a run directory, one of its checkpoints, or a Hugging Face directory.
        task: what a classifier answers: a task of CLUE or a YAML file; default what it was
            fine-tuned for.
        host: address to listen at. There is no password: beyond loopback, who reaches the port
            may use the model.
        port: TCP port; 0 takes a free one.
        max_batch: texts that the model computes together.
        max_wait_ms: how long a request may wait for others to be computed with.
        max_waiting: texts that may wait; beyond them requests get 503 and Retry-After.
        max_length: tokens read of a text; default what the task is trained with.
        body_bytes: largest body of a request.
        texts: most texts in a request.
        text_chars: longest text of a request.
    """
    check_installed()
    import uvicorn

    from clue_ds.tasks.serve.app import Limits, compute, create_app
    from clue_ds.tasks.serve.batcher import Batcher

    limits = Limits(body_bytes, texts, text_chars)
    for name, value in {
        **vars(limits), "max_batch": max_batch, "max_waiting": max_waiting
    }.items():  # fmt: skip
        if value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")
    if max_wait_ms < 0:
        raise UserError(f"--max-wait-ms {max_wait_ms} must not be negative")
    with bind(host, port) as listener:
        predictor = Predictor(model, task, max_batch, max_length)
        batcher = Batcher(compute(predictor), max_batch, max_wait_ms / 1000, max_waiting)
        app = create_app(predictor, batcher, limits)
        settings = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=SECONDS_TO_DRAIN,
        )
        listener.listen(settings.backlog)
        _announce(listener, predictor)
        uvicorn.Server(settings).run(sockets=[listener])


def check_installed() -> None:
    """UserError when the extra is missing."""
    missing = [n for n in ("fastapi", "uvicorn") if importlib.util.find_spec(n) is None]
    if missing:
        raise UserError(
            f"serving needs {' and '.join(missing)}; install with: pip install 'clue_ds[serve]'"
        )


def bind(host: str, port: int) -> socket.socket:
    """A socket with that address, before the model is loaded: a taken port is known at once."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # asyncio turns Nagle's algorithm off only for sockets that say they are TCP's; with it each
        # answer waits 40 ms for the client's delayed acknowledgement.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"can't listen at {host} port {port}: {error}; give another --host or --port"
        ) from None
    return listener


def _announce(listener: socket.socket, predictor: Predictor) -> None:
    host, port = listener.getsockname()[:2]
    if not ipaddress.ip_address(host).is_loopback:
        print(
            f"clue-ds serve: WARNING: {host} can be reached from other machines, and there is no "
            "password and no encryption; put a proxy that has both in front",
            file=sys.stderr,
        )
    shown = f"[{host}]" if ":" in host else host
    task = f", task {predictor.task.name}" if predictor.task else ""
    print(
        f"serving {predictor.directory.name}{task} at http://{shown}:{port}   (Ctrl-C ends it)",
        flush=True,
    )
