"""The run lock: a file in a directory that names the process which writes there.

Guarantees: two processes never train in one run directory, on one machine or on two, also when they
start at the same moment over the lock of a killed run: exactly one of them gets it. A process of
this machine holds its lock as long as it exists, running or stopped. A process elsewhere (another
host, or a container with process ids of its own) holds it as long as the file changes: whoever
wants the lock watches the file for SECONDS_UNTIL_DEAD on its own monotonic clock, so no two clocks
are ever compared. Each lock has a random token. A holder that was paused so long that others took
its lock over finds another token, stops with a message, and publishes and deletes nothing.

A lock is replaced or removed only by the one process that could create the file `alive.json.TOKEN`,
named after the token of the lock that is to go, and only while that lock is still the one in place.
If a process is killed in those milliseconds, its file is replaced in the same way.

Rejected: a lock of the file system (shared disks often have none, and it does not tell the owner);
hard links (not every shared disk has them); the age of the file by this machine's clock.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from clue_ds.job import procfs, rendezvous
from clue_ds.job.rendezvous import Peer
from clue_ds.settings import program

FILE, SECONDS_BETWEEN_TOUCHES = "alive.json", 10.0
# A slow disk may delay one touch; a process elsewhere that missed three is dead.
SECONDS_UNTIL_DEAD = 3 * SECONDS_BETWEEN_TOUCHES
SECONDS_BETWEEN_LOOKS = 0.2


class Sign(NamedTuple):
    """What a lock file says, and the state of the file.

    `peer`: None when the file is half written. `boot` and `started` (in clock ticks after the boot)
    tell a process from another one with the same number; locks of earlier versions have neither.
    `change`: differs after each touch.
    """

    peer: Peer | None
    boot: str
    started: int
    token: str
    change: tuple[int, str]

    def is_on_this_machine(self) -> bool:
        """Whether its process can be looked up here."""
        if self.peer is None or self.boot not in ("", procfs.boot_id()):
            return False
        me = rendezvous.myself()
        return (self.peer.host, self.peer.namespace) == (me.host, me.namespace)

    def state(self) -> str:
        """The state of a process on this machine: dead, stopped or alive."""
        assert self.peer is not None
        if self.started and procfs.started(self.peer.pid) != self.started:
            return "dead"
        return procfs.state(self.peer.pid)


class _Held(NamedTuple):
    """A lock of this process: its file, which stays open, its token, and whether it was given up.

    The thread that touches the file closes it.
    """

    path: Path
    descriptor: int
    token: str
    ended: threading.Event

    def is_in_place(self) -> bool:
        sign = read(self.path)
        return sign is not None and sign.token == self.token


_held: dict[Path, _Held] = {}


# ------------------------------------------------------------------------------ what others call


def claim(
    run_dir: str | Path,
    me: Peer,
    end: threading.Event,
    on_loss: Callable[[str], None] | None = None,
) -> str | None:
    """Lock `run_dir` for this process until `end`; the message when another process holds it.

    `on_loss` is called in a thread, with a message, when another process has taken the lock over.
    """
    path = _key(run_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    created = None
    while created is None:
        sign = read(path)
        # A lock of `me` is left from an earlier run of this process.
        if sign is not None and not (sign.is_on_this_machine() and sign.peer == me):
            state = _state_of_holder(path, sign)
            if state in ("alive", "stopped"):
                return _refusal(run_dir, sign.peer, state)
            if state == "changed":
                continue
        created = _take(path, me, sign)
    if path in _held:
        _held[path].ended.set()
    held = _held[path] = _Held(path, *created, threading.Event())
    threading.Thread(target=_touch, args=(held, end, on_loss), daemon=True).start()
    atexit.register(withdraw, run_dir)
    return None


def lost(run_dir: str | Path) -> str | None:
    """The message when another process has taken over this process' lock on `run_dir`.

    Whoever publishes or deletes something there asks first. None for a directory never locked.
    """
    held = _held.get(_key(run_dir))
    if held is None or held.is_in_place():
        return None
    sign = read(held.path)
    if sign is None:
        return (
            f"{held.path}, the lock of this run, was deleted, so another process may train in "
            f"{run_dir}. This one ends and writes nothing more; the same command continues the run"
        )
    who = f"process {sign.peer.pid} on {sign.peer.host}" if sign.peer else "another process"
    return (
        f"{who} has taken over {run_dir}, because this process was paused, or cut off from the "
        f"disk, for more than {SECONDS_UNTIL_DEAD:.0f} s. This one ends and writes nothing more "
        f"there; `{program.command('status', run_dir)}` shows how the run goes on"
    )


def withdraw(run_dir: str | Path) -> None:
    """Remove this process' lock at the normal end of the run; the lock of another one stays."""
    held = _held.pop(_key(run_dir), None)
    if held is None:
        return
    held.ended.set()
    with contextlib.suppress(OSError):  # the disk or the directory may be gone
        _remove(held)


def read(path: Path) -> Sign | None:
    """The lock in the file `path`; None when there is none."""
    try:
        # Opening makes a network disk ask its server; a plain stat may answer from a cache.
        with path.open("rb") as file:
            status, content = os.fstat(file.fileno()), file.read()
    except FileNotFoundError:
        return None
    digest = hashlib.sha256(content).hexdigest()[:16]
    change = (status.st_mtime_ns, digest)
    try:
        values: dict[str, Any] = json.loads(content)
        peer = Peer(str(values["host"]), int(values["pid"]), str(values["namespace"]))
        boot, started = str(values.get("boot", "")), int(values.get("started", 0))
        token = str(values.get("token", digest))
    except (ValueError, TypeError, KeyError):  # it is being written, or a full disk cut it off
        return Sign(None, "", 0, digest, change)
    return Sign(peer, boot, started, token, change)


# ---------------------------------------------------------------------------------- the protocol


def _key(run_dir: str | Path) -> Path:
    return Path(run_dir).absolute() / FILE


def _state_of_holder(path: Path, first: Sign) -> str:
    """alive, stopped or dead; "changed" when the lock in `path` is not `first` any more."""
    if first.is_on_this_machine():
        return first.state()
    print(
        f"{path}: waiting up to {SECONDS_UNTIL_DEAD:.0f} s to see if that run is alive", flush=True
    )
    deadline = time.monotonic() + SECONDS_UNTIL_DEAD
    while time.monotonic() < deadline:
        time.sleep(SECONDS_BETWEEN_LOOKS)
        now = read(path)
        if now is None or now.token != first.token:
            return "changed"
        if now.change != first.change:
            return "alive"
    return "dead"


def _take(path: Path, me: Peer, dead: Sign | None) -> tuple[int, str] | None:
    """Create the lock `path`, in place of `dead`. As _create; None: look again at what is there."""
    if dead is None:
        return _create(path, me)
    # Only one process can create this file, and it exists until the lock is replaced.
    claim_file = path.with_name(f"{FILE}.{dead.token}")
    created = _create(claim_file, me)
    if created is None:
        other = read(claim_file)
        if other is None or _state_of_holder(claim_file, other) != "dead":
            time.sleep(SECONDS_BETWEEN_LOOKS)
            return None
        created = _take(claim_file, me, other)
        if created is None:
            return None
    now = read(path)
    if now is None or now.token != dead.token:  # replaced meanwhile
        claim_file.unlink(missing_ok=True)
        os.close(created[0])
        return None
    os.replace(claim_file, path)
    return created


def _create(path: Path, me: Peer) -> tuple[int, str] | None:
    """Write a new lock of process `me`: an open descriptor and its token; None when it exists."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        return None
    token = secrets.token_hex(8)
    is_here = me[::2] == rendezvous.myself()[::2]
    values = {
        **me._asdict(),
        "boot": procfs.boot_id() if is_here else "",
        "started": procfs.started(me.pid) if is_here else 0,
        "token": token,
    }
    try:
        os.write(descriptor, (json.dumps(values) + "\n").encode())
    except OSError:
        os.close(descriptor)
        path.unlink()
        raise
    return descriptor, token


def _remove(held: _Held) -> None:
    """Delete the lock if it is still ours; nobody can replace it meanwhile."""
    claim_file = held.path.with_name(f"{FILE}.{held.token}")
    created = _create(claim_file, rendezvous.myself())
    if created is None:
        return  # somebody is taking it over
    os.close(created[0])
    if held.is_in_place():
        held.path.unlink(missing_ok=True)
    claim_file.unlink(missing_ok=True)


def _touch(held: _Held, end: threading.Event, on_loss: Callable[[str], None] | None) -> None:
    """Touch the file until the end. Through the open file, which nobody else's lock can be."""
    while not end.wait(SECONDS_BETWEEN_TOUCHES) and not held.ended.is_set():
        with contextlib.suppress(OSError):  # the run survives a full or slow disk
            os.utime(held.descriptor)
            if held.is_in_place() or held.ended.is_set():
                continue
            message = lost(held.path.parent)
            if message is not None and on_loss is not None:
                on_loss(message)
            break
    os.close(held.descriptor)


def _refusal(run_dir: str | Path, other: Peer | None, state: str) -> str:
    assert other is not None  # a lock without a process is watched until it changes or is dead
    what = "is stopped (Ctrl-Z or SIGSTOP) while it trains in it" if state == "stopped" else ""
    advice = f"Let it continue (kill -CONT {other.pid})" if what else "Wait until it ends"
    return (
        f"run_dir {run_dir} is in use: process {other.pid} on {other.host} "
        f"{what or 'trains in it'}. {advice}, or make it save and stop (on {other.host}: "
        f"kill -USR1 {other.pid}), or give another run_dir"
    )
