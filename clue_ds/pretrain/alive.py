"""The sign by which `clue-ds status` knows that a run is alive: a file that is touched.

Guarantees: a thread of its own does it, so that a slow disk delays nobody.
"""

from __future__ import annotations

import contextlib
import json
import threading
from pathlib import Path

from clue_ds.pretrain.rendezvous import Peer

FILE, SECONDS_BETWEEN_SIGNS = "alive.json", 10.0


def announce(run_dir: str | Path, peer: Peer, end: threading.Event) -> None:
    """Write who runs it into `run_dir`, and touch that file until `end`."""
    path = Path(run_dir) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"host": peer.host, "pid": peer.pid}) + "\n")
    threading.Thread(target=_sign_until, args=(path, end), daemon=True).start()


def _sign_until(path: Path, end: threading.Event) -> None:
    while not end.wait(SECONDS_BETWEEN_SIGNS):
        with contextlib.suppress(OSError):  # a full or slow disk is not the run's death
            path.touch()


def withdraw(run_dir: str | Path) -> None:
    """The run has ended as it should."""
    Path(run_dir, FILE).unlink(missing_ok=True)
