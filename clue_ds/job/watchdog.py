"""Ends a job that can't go on, and says which rank, on which host, and why.

Each rank runs two threads beside the training loop. `talk` sends a beat to rank 0's store every two
seconds (step, section, the main thread's stack) and reads the verdict there; on rank 0 it also
reads all beats and judges. `watch` never waits for anybody: it notices that rank 0 has become
silent, that the launcher is gone, and signals, which it reads from a pipe, because a main thread
inside a collective runs no Python handler.

Guarantees: a rank that raises, is killed, is stopped, hangs, or is cut off ends every other rank
after the deadlines of config.health (under two minutes) with the exit status of the kind; one rank
prints the verdict, with the last known stacks of the odd ones out. Setup and saving may take long
as long as some rank gets on (progress.py); those that wait for it don't count. Pretraining,
fine-tuning, prediction and `clue-ds doctor` have the same watchdog.

Rejected: timeouts of collectives (DeepSpeed's groups ignore what is asked for, and they say that
something took long, not which rank is to blame); beats from everybody to everybody (quadratic).
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import json
import os
import re
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from clue_ds import dist
from clue_ds.config import DEFAULT_HEALTH, HealthSection
from clue_ds.errors import UserError
from clue_ds.job import diagnosis, procfs, rendezvous, run_lock
from clue_ds.job.diagnosis import Verdict
from clue_ds.job.heartbeat import Activity
from clue_ds.job.stop import StopRequest

SECONDS_BETWEEN_BEATS = 2.0
# After a collective failed somewhere, a rank that misses this much of beats is the cause.
SECONDS_UNDER_SUSPICION = 8.0
SECONDS_FOR_A_VERDICT = 20.0
FAILED_COLLECTIVE = re.compile(
    "gloo|nccl|ProcessGroup|Connection (closed|reset)|Broken pipe", re.IGNORECASE
)


class Watchdog(Activity):
    """The threads of one rank. `stop`: whether somebody asked this run to save and end.

    `can_stop`: whether the run saves and stops when it is asked; else TERM simply ends it.
    `launcher`: the process whose end is this one's end too; None for a run that a shell started,
    which goes on in the background when the shell ends.
    """

    def __init__(
        self,
        health: HealthSection,
        meeting: rendezvous.Meeting,
        command: str,
        can_stop: bool,
        launcher: int | None,
    ) -> None:
        self._judge = diagnosis.Judge(meeting.peers, health, SECONDS_UNDER_SUSPICION)
        self.stop = StopRequest()
        super().__init__(health)
        self._command, self._can_stop = command, can_stop
        self._meeting = meeting
        self._rank, self._world_size = dist.rank(), dist.world_size()
        self._me = meeting.peers[self._rank]
        self._number = 0
        self._suspicion: str | None = None
        self._last_talk = time.monotonic()
        self._closing, self._left = threading.Event(), threading.Lock()
        self._launcher = launcher
        self._signals, self._wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        self._install_handlers()
        if self._world_size > 1:
            self._store = meeting.connect(timedelta(seconds=health.beat_seconds))
            self._beat()
            self._thread(self._talk_forever, "clue-ds-talk")
        self._thread(self._watch_forever, "clue-ds-watch")
        atexit.register(self.close)

    def _thread(self, function: Any, name: str) -> None:
        threading.Thread(target=function, name=name, daemon=True).start()

    def _install_handlers(self) -> None:
        """The handlers do nothing: it is the number in the pipe that counts."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)

    # ------------------------------------------------------------------ what the loop calls

    def step(self, step: int) -> bool:
        """A step has ended; returns whether all ranks save and stop now."""
        super().step(step)
        return self.stop.agreed(step)

    def claim(self, run_dir: str | Path) -> None:
        """Keep other processes out of `run_dir`, and let `clue-ds status` see that it is alive.

        UserError on every rank when another process trains into it.
        """
        error = run_lock.claim(run_dir, self._me, self._closing) if self._rank == 0 else None
        dist.agree(error)

    def begin(self, health: HealthSection) -> None:
        super().begin(health)
        self._judge.health = health
        self.stop.begin()

    def failed(self, error: BaseException) -> None:
        """The main thread raised: find out whose fault it is, tell all, and leave if not ours."""
        if isinstance(error, UserError):
            # Said at once: a launcher ends this rank as soon as another has left.
            if self._publish(self._verdict("user error", str(error), [])):
                print(f"{self._command}: error: {error}", file=sys.stderr, flush=True)
        else:
            if FAILED_COLLECTIVE.search(f"{type(error).__name__} {error}"):
                self._suspicion = str(error)[:500]
                self._closing.wait(SECONDS_FOR_A_VERDICT)  # a verdict ends this process
            self._publish(self._verdict("exception", diagnosis.raised(error), [self._rank]))
        self._let_others_read()

    def close(self) -> None:
        """Take leave of the others; rank 0, which holds the store, goes last."""
        if self._closing.is_set():
            return
        self._closing.set()
        atexit.unregister(self.close)
        # A late USR1 must not mark a finished job as failed.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)
        self._signals.close()
        if self._world_size == 1:
            return
        with contextlib.suppress(RuntimeError):  # the store may be gone already
            self._store.set(f"bye/{self._rank}", "")
            if self._rank == 0:
                self._wait_for_goodbyes()

    def _wait_for_goodbyes(self) -> None:
        """A rank that is stopped while it ends would keep torchrun and mpirun for ever."""
        began = time.monotonic()
        waited, missing = 0.0, list(range(self._world_size))
        while missing := [rank for rank in missing if not self._store.check([f"bye/{rank}"])]:
            waited = time.monotonic() - began
            if waited > self.health.beat_seconds:
                state = self._neighbours().get(str(missing[0]))
                text = f"has not ended: it {diagnosis.silence(state, waited)}"
                kind = diagnosis.kind_of_silence(state)
                self._leave(self._verdict(kind, text, missing), at_the_end=True)
            time.sleep(0.05)

    # ---------------------------------------------------------------------- talking, judging

    def _beat(self) -> None:
        self._number += 1
        beat = {
            **self.report(),
            "number": self._number,
            "suspicion": self._suspicion,
            "neighbours": self._neighbours(),
        }
        self._store.set(f"beat/{self._rank}", json.dumps(beat))

    def _neighbours(self) -> dict[str, str]:
        """What became of the other ranks of this host: dead, stopped or alive."""
        return {
            str(rank): procfs.state(peer.pid)
            for rank, peer in enumerate(self._meeting.peers)
            if rank != self._rank and peer[::2] == self._me[::2]
        }

    def _talk_forever(self) -> None:
        while not self._closing.wait(SECONDS_BETWEEN_BEATS):
            try:
                self._talk()
            except RuntimeError as error:  # rank 0's store has closed the connection
                self._store_is_gone(error)
                return
            self._last_talk = time.monotonic()

    def _talk(self) -> None:
        self._beat()
        if self._store.check(["verdict"]):
            self._leave(Verdict(**json.loads(self._store.get("verdict"))))
        if self._rank:
            return
        keys = [f"beat/{rank}" for rank in range(self._world_size)]
        if self._store.check(keys):
            beats = [json.loads(beat) for beat in self._store.multi_get(keys)]
        else:
            come = [self._store.check([key]) for key in keys]
            beats = [
                json.loads(self._store.get(key)) if is_there else diagnosis.NO_BEAT
                for key, is_there in zip(keys, come, strict=True)
            ]
        gone = {r for r in range(self._world_size) if self._store.check([f"bye/{r}"])}
        verdict = self._judge.judge(beats, gone, time.monotonic())
        if verdict is not None:
            self._publish(verdict)
            self._leave(verdict)

    def _store_is_gone(self, error: RuntimeError) -> None:
        if self._closing.is_set():
            return
        dead = self._neighbours().get("0") == "dead"
        reason = str(error).splitlines()[0]
        text = diagnosis.silence("dead", 0) if dead else f"is gone ({reason})"
        self._leave(self._verdict("died", text, [0]))

    def _verdict(self, kind: str, text: str, ranks: list[int]) -> Verdict:
        stacks = {str(self._rank): self.stack()} if self._rank in ranks else {}
        return diagnosis.make(kind, text, ranks, self._meeting.peers, stacks)

    def _publish(self, verdict: Verdict) -> bool:
        """Make it everybody's verdict; False when there is one already."""
        text, is_ours = json.dumps(verdict._asdict()), True
        with contextlib.suppress(RuntimeError):
            is_ours = self._store.compare_set("verdict", "", text).decode() == text
        diagnosis.write(verdict)
        return is_ours

    # -------------------------------------------------------------------------- watching

    def _watch_forever(self) -> None:
        poll = select.poll()
        with contextlib.suppress(OSError, ValueError):
            poll.register(sys.stdout.fileno(), 0)
        while not self._closing.is_set():
            with contextlib.suppress(OSError, ValueError):
                if select.select([self._signals], [], [], 1.0)[0]:
                    for number in self._signals.recv(64):
                        self._on_signal(number)
            if self._closing.is_set():
                return
            self.stop.look_for_file()
            # Whoever read our output, or launched us, is gone: ssh, a killed launcher.
            broken = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
            if broken or self._launcher not in (None, os.getppid()):
                os._exit(1)
            if self._world_size > 1:
                self._check_rank_0()

    def _check_rank_0(self) -> None:
        limit = SECONDS_UNDER_SUSPICION if self._suspicion else self.health.beat_seconds
        silent = time.monotonic() - self._last_talk
        if self._rank == 0 or silent < limit + SECONDS_BETWEEN_BEATS:
            return
        state = self._neighbours().get("0")
        text = diagnosis.silence(state, silent)
        self._leave(self._verdict(diagnosis.kind_of_silence(state), text, [0]))

    def _on_signal(self, number: int) -> None:
        if number == signal.SIGUSR1:
            self.stop.ask()
        elif number == signal.SIGTERM:
            dead = [int(r) for r, state in self._neighbours().items() if state == "dead"]
            if dead and not self._closing.is_set():
                # How launchers end the ranks beside one that died.
                self._leave(self._verdict("died", diagnosis.silence("dead", 0), dead[:1]))
            if self._can_stop and dist.term_means_stop():
                self.stop.ask()
            else:
                os._exit(128 + signal.SIGTERM)

    def _leave(self, verdict: Verdict, at_the_end: bool = False) -> None:
        """Say it once a job, and end this process."""
        is_late = self._closing.is_set() and not at_the_end
        if not self._left.acquire(blocking=False) or is_late:
            return
        # A hanging disk must not keep us.
        writer = threading.Thread(
            target=diagnosis.report, args=(verdict, self._command), daemon=True
        )
        writer.start()
        writer.join(5.0)
        if self._rank in verdict.ranks and verdict.kind == "hang":
            faulthandler.dump_traceback(all_threads=True)
        sys.stdout.flush()
        self._let_others_read()
        os._exit(verdict.status)

    def _let_others_read(self) -> None:
        """Rank 0 holds the store: it stays until the others have had time for another beat."""
        if self._rank == 0:
            time.sleep(2 * SECONDS_BETWEEN_BEATS + 0.5)


_watchdog: Watchdog | None = None


def start(
    health: HealthSection, command: str = "clue-ds pretrain", can_stop: bool = True
) -> Watchdog:
    """This process' watchdog, told the deadlines of the run that begins; all ranks meet here."""
    global _watchdog
    if _watchdog is None:
        # Asked first: to meet sets the variables that a launcher left out.
        launcher = os.getppid() if dist.is_launched() else None
        meeting = rendezvous.meet(health.start_seconds)
        _watchdog = Watchdog(health, meeting, command, can_stop, launcher)
    _watchdog.begin(health)
    return _watchdog


def current() -> Activity:
    """This process' watchdog; where none was started, something that takes the same calls."""
    return Activity(DEFAULT_HEALTH) if _watchdog is None else _watchdog


@contextlib.contextmanager
def reporting() -> Iterator[None]:
    """An error that ends this rank is told to the others, so that none waits for it.

    A UserError leaves as SystemExit once it has been said.
    """
    try:
        yield
    except Exception as error:
        if _watchdog is None or dist.world_size() == 1:
            raise
        _watchdog.failed(error)  # doesn't return where another rank is the cause
        if isinstance(error, UserError):
            raise SystemExit(diagnosis.STATUS["user error"]) from None
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(diagnosis.STATUS["exception"])
