"""Ends a job that can't continue, and reports which rank failed, on which host, and why.

Each rank runs two threads beside the training loop. The heartbeat thread writes a heartbeat (step,
section, stack of the main thread) to rank 0's store every two seconds and reads the diagnosis
there; on rank 0 it also reads all heartbeats and makes the diagnosis. The watch thread never waits
for another rank. It notices that rank 0 has become silent or that the launcher is gone, and handles
signals, which it reads from a pipe, because Python runs no signal handler while the main thread is
inside a collective.

USR1, INT and TERM ask a run that can save to save and stop; a second INT or TERM ends the rank at
once. Two senders of TERM mean something else: launchers send it to the ranks that are left when a
rank has died, which the watch thread sees by looking at its neighbours, and `clue-ds launch` sends
it when it ends the job, after it has created END_FILE.

Guarantees: when a rank raises, is killed, is stopped, hangs or loses its network link, every other
rank ends after the deadlines of config.health (under two minutes) with the exit status of that kind
of failure; one rank prints the diagnosis, with the last known stacks of the ranks to blame. Setup
and saving may take long as long as some rank makes progress (heartbeat.py); waiting for that rank
is not progress. Pretraining, fine-tuning, prediction and `clue-ds doctor` use the same watchdog.

Rejected: timeouts of collectives (DeepSpeed's groups ignore the one that is asked for, and it tells
that something took long, not which rank is to blame); heartbeats between all pairs (quadratic).
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from clue_ds import dist
from clue_ds.errors import UserError, first_line
from clue_ds.job import alone, diagnosis, procfs, rendezvous, run_lock, signals
from clue_ds.job.diagnosis import Diagnosis
from clue_ds.job.heartbeat import Activity
from clue_ds.job.signals import SignalPipe
from clue_ds.job.stop import StopRequest
from clue_ds.settings.sections import DEFAULT_HEALTH, HealthSection

SECONDS_BETWEEN_HEARTBEATS = 2.0
# Once a collective has failed on some rank, a rank that is silent for this long is the cause.
SECONDS_UNDER_SUSPICION = 8.0
SECONDS_FOR_A_DIAGNOSIS = 20.0
SECONDS_UNDER_A_FAILURE = 0.25  # between heartbeats of a rank whose collective has failed
# Ctrl-C ends the `tee` behind a run at the same moment as it asks the run to stop.
SECONDS_FOR_A_SIGNAL = 0.5


class Watchdog(Activity):
    """The watchdog of one rank. `stop`: whether it is to save and stop; `hosts`: of all ranks.

    `can_stop`: whether the run can save and stop on request; otherwise INT and TERM simply end it.
    `launcher`: when this process ends, the rank ends too; None for a run that a shell started,
    which continues in the background when the shell ends.
    """

    def __init__(
        self,
        health: HealthSection,
        meeting: rendezvous.Meeting,
        command: str,
        can_stop: bool,
        launcher: int | None,
    ) -> None:
        self._monitor = diagnosis.Monitor(meeting.peers, health, SECONDS_UNDER_SUSPICION)
        self.stop = StopRequest()
        super().__init__(health)
        self._command, self._can_stop = command, can_stop
        self._meeting = meeting
        self._rank, self._world_size = dist.rank(), dist.world_size()
        self._me = meeting.peers[self._rank]
        self.hosts = [peer.host for peer in meeting.peers]
        self._number = 0
        self._suspicion: str | None = None
        self._last_exchange = time.monotonic()
        self._closing, self._ending = threading.Event(), threading.Lock()
        self._hurry = threading.Event()  # wakes the heartbeat thread
        self._launcher = launcher
        numbers = [signal.SIGTERM, signal.SIGUSR1]
        if can_stop and not signals.is_ignored(signal.SIGINT):
            numbers.append(signal.SIGINT)
        self._signals = SignalPipe(numbers)
        if self._world_size > 1:
            self._store = meeting.connect(timedelta(seconds=health.beat_seconds))
            self._send_heartbeat()
            self._thread(self._exchange_heartbeats, "clue-ds-heartbeat")
        self._thread(self._watch, "clue-ds-watch")
        atexit.register(self.close)

    def _thread(self, function: Any, name: str) -> None:
        threading.Thread(target=function, name=name, daemon=True).start()

    # ------------------------------------------------------------------ what the loop calls

    def step(self, step: int) -> bool:
        """A step has ended; True when all ranks are to save and stop now."""
        super().step(step)
        return self.stop.agreed(step)

    def claim(self, run_dir: str | Path) -> None:
        """Lock `run_dir` for this run, and let `clue-ds status` see that the run is alive.

        UserError on every rank when another process trains in it.
        """
        error = None
        if self._rank == 0:
            error = run_lock.claim(run_dir, self._me, self._closing, self._lost_lock)
        dist.agree(error)

    def _lost_lock(self, text: str) -> None:
        """Another process has taken over the run: end the job, and touch nothing."""
        found = self._diagnose("user error", text, [])
        if self._world_size > 1:
            self._publish(found)
        diagnosis.write(found)
        print(f"{self._command}: error: {text}", file=sys.stderr, flush=True)
        self._end(found)

    def begin(self, health: HealthSection) -> None:
        super().begin(health)
        self._monitor.health = health
        self.stop.begin()

    def failed(self, error: BaseException) -> None:
        """The main thread raised: find and publish the cause; end here if it is another rank."""
        if isinstance(error, UserError):
            # Printed at once: a launcher ends this rank as soon as another one has ended.
            if self._publish(self._diagnose("user error", str(error), [])):
                print(f"{self._command}: error: {error}", file=sys.stderr, flush=True)
        else:
            if diagnosis.is_failed_collective(error):
                self._suspicion = str(error)[:500]
                self._hurry.set()
                self._closing.wait(SECONDS_FOR_A_DIAGNOSIS)  # a diagnosis ends this process
            self._publish(self._diagnose("exception", diagnosis.raised(error), [self._rank]))
        self._let_others_read()

    def close(self) -> None:
        """End normally; rank 0, which holds the store, waits for the other ranks to end first."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._hurry.set()
        atexit.unregister(self.close)
        # A late USR1 must not make a finished job look failed.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        self._signals.close()
        if self._world_size == 1:
            return
        with contextlib.suppress(RuntimeError):  # the store may be gone already
            self._store.set(f"ended/{self._rank}", "")
            if self._rank == 0:
                self._wait_for_other_ranks()

    def _wait_for_other_ranks(self) -> None:
        """End the job if another rank does not end: torchrun and mpirun have no such limit."""
        began = time.monotonic()
        waited, missing = 0.0, list(range(self._world_size))
        while missing := [rank for rank in missing if not self._store.check([f"ended/{rank}"])]:
            waited = time.monotonic() - began
            if waited > self.health.beat_seconds:
                state = self._neighbours().get(str(missing[0]))
                text = f"has not ended: it {diagnosis.silence(state, waited)}"
                kind = diagnosis.kind_of_silence(state)
                self._end(self._diagnose(kind, text, missing), at_the_end=True)
            time.sleep(0.05)

    # ------------------------------------------------------------------- the heartbeat thread

    def _send_heartbeat(self) -> None:
        self._number += 1
        heartbeat = {
            **self.report(),
            "number": self._number,
            "suspicion": self._suspicion,
            "neighbours": self._neighbours(),
        }
        self._store.set(f"heartbeat/{self._rank}", json.dumps(heartbeat))

    def _neighbours(self) -> dict[str, str]:
        """State of the other ranks on this host: dead, stopped or alive."""
        return {
            str(rank): procfs.state(peer.pid)
            for rank, peer in enumerate(self._meeting.peers)
            if rank != self._rank and peer[::2] == self._me[::2]
        }

    def _exchange_heartbeats(self) -> None:
        while True:
            if self._suspicion is None:
                self._hurry.wait(SECONDS_BETWEEN_HEARTBEATS)
            else:  # another rank is likely to have published the cause already
                self._closing.wait(SECONDS_UNDER_A_FAILURE)
            if self._closing.is_set():
                return
            try:
                self._exchange()
            except RuntimeError as error:  # rank 0's store has closed the connection
                self._store_is_gone(error)
                return
            self._last_exchange = time.monotonic()

    def _exchange(self) -> None:
        self._send_heartbeat()
        if self._store.check(["diagnosis"]):
            published = Diagnosis(**json.loads(self._store.get("diagnosis")))
            self._have_read()  # only now: rank 0 may close the store at once
            self._end(published)
        if self._rank:
            return
        keys = [f"heartbeat/{rank}" for rank in range(self._world_size)]
        if self._store.check(keys):
            heartbeats = [json.loads(text) for text in self._store.multi_get(keys)]
        else:
            sent = [self._store.check([key]) for key in keys]
            heartbeats = [
                json.loads(self._store.get(key)) if is_sent else diagnosis.NO_HEARTBEAT
                for key, is_sent in zip(keys, sent, strict=True)
            ]
        gone = {r for r in range(self._world_size) if self._store.check([f"ended/{r}"])}
        found = self._monitor.check(heartbeats, gone, time.monotonic())
        if found is not None:
            self._publish(found)
            self._end(found)

    def _store_is_gone(self, error: RuntimeError) -> None:
        if self._closing.is_set():
            return
        dead = self._neighbours().get("0") == "dead"
        reason = first_line(error)
        text = diagnosis.silence("dead", 0) if dead else f"is gone ({reason})"
        self._end(self._diagnose("died", text, [0]))

    def _diagnose(self, kind: str, text: str, ranks: list[int]) -> Diagnosis:
        stacks = {str(self._rank): self.stack()} if self._rank in ranks else {}
        return diagnosis.make(kind, text, ranks, self._meeting.peers, stacks)

    def _publish(self, found: Diagnosis) -> bool:
        """Send the diagnosis to all ranks; False when there is one already."""
        text, is_ours = json.dumps(found._asdict()), True
        with contextlib.suppress(RuntimeError):
            is_ours = self._store.compare_set("diagnosis", "", text).decode() == text
        diagnosis.write(found)
        return is_ours

    # ----------------------------------------------------------------------- the watch thread

    def _watch(self) -> None:
        while not self._closing.is_set():
            self._read_signals(1.0)
            if self._closing.is_set():
                return
            # The reader of our output (ssh) or our launcher is gone.
            broken = self._signals.output_is_broken()
            if broken or self._launcher not in (None, os.getppid()):
                self._read_signals(SECONDS_FOR_A_SIGNAL)
                self._lost(broken)
            if self._world_size > 1:
                self._check_rank_0()

    def _read_signals(self, seconds: float) -> None:
        """Wait up to `seconds` for signals, and handle them."""
        for number in self._signals.read(seconds):
            self._on_signal(number)
        self.stop.look_for_file()

    def _lost(self, output: bool) -> None:
        """The reader of our output or our launcher is gone: end, unless this run saves and stops.

        Under `clue-ds launch` no rank outlives its launcher.
        """
        if not self.stop.is_asked() or (not output and dist.job_dir() is not None):
            os._exit(1)
        if output:
            signals.discard_output()
        else:
            self._launcher = None

    def _check_rank_0(self) -> None:
        limit = SECONDS_UNDER_SUSPICION if self._suspicion else self.health.beat_seconds
        silent = time.monotonic() - self._last_exchange
        if self._rank == 0 or silent < limit + SECONDS_BETWEEN_HEARTBEATS:
            return
        state = self._neighbours().get("0")
        text = diagnosis.silence(state, silent)
        self._end(self._diagnose(diagnosis.kind_of_silence(state), text, [0]))

    def _on_signal(self, number: int) -> None:
        if number == signal.SIGUSR1:
            self.stop.ask()
            return
        if number == signal.SIGTERM:
            if self.stop.launcher_ends():
                os._exit(128 + number)
            dead = [int(r) for r, state in self._neighbours().items() if state == "dead"]
            if dead and self.stop.is_agreed:
                # Another rank has saved and left, and its launcher now ends the rest. If it died
                # instead, the heartbeats show it.
                return
            if dead and not self._closing.is_set():
                # Launchers send TERM to the other ranks when one has died.
                self._end(self._diagnose("died", diagnosis.silence("dead", 0), dead[:1]))
        was_asked = self.stop.is_asked()
        if not self._can_stop or not self.stop.ask_by_signal():
            os._exit(128 + number)
        if self._rank == 0 and not was_asked:
            signals.say_that_it_stops(self._command, number)

    def _end(self, found: Diagnosis, at_the_end: bool = False) -> None:
        """Report the diagnosis (once per job) and end this process."""
        if not self._ending.acquire(blocking=False) or (self._closing.is_set() and not at_the_end):
            return
        # A disk that hangs must not keep this process.
        writer = threading.Thread(target=diagnosis.report, args=(found, self._command), daemon=True)
        writer.start()
        writer.join(5.0)
        if self._rank in found.ranks and found.kind == "hang":
            faulthandler.dump_traceback(all_threads=True)
        sys.stdout.flush()
        self._let_others_read()
        os._exit(found.status)

    def _let_others_read(self) -> None:
        """Rank 0 holds the store, so it waits until the others have read the diagnosis."""
        if self._rank:
            return self._have_read()
        deadline = time.monotonic() + 2 * SECONDS_BETWEEN_HEARTBEATS + 0.5
        waiting = list(range(1, self._world_size))
        while waiting and time.monotonic() < deadline:
            time.sleep(0.05)
            dead = {int(r) for r, state in self._neighbours().items() if state == "dead"}
            with contextlib.suppress(RuntimeError):
                waiting = [
                    r for r in waiting if r not in dead and not self._store.check([f"read/{r}"])
                ]

    def _have_read(self) -> None:
        """Tell rank 0 that this rank no longer needs the store."""

        def tell() -> None:
            with contextlib.suppress(RuntimeError):
                self._store.set(f"read/{self._rank}", "")

        # Where the link to rank 0 is cut, the store answers only after minutes.
        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        thread.join(SECONDS_BETWEEN_HEARTBEATS)


_watchdog: Watchdog | None = None


def start(
    health: HealthSection, command: str = "clue-ds pretrain", can_stop: bool = True
) -> Watchdog:
    """Start this process' watchdog, or begin another run with it; every rank must call it."""
    global _watchdog
    if _watchdog is None or _watchdog._closing.is_set():
        # Asked first: rendezvous.meet sets the variables that a launcher left out.
        launcher = os.getppid() if dist.is_launched() else None
        meeting = rendezvous.meet(health.start_seconds)
        _watchdog = Watchdog(health, meeting, command, can_stop, launcher)
    _watchdog.begin(health)
    return _watchdog


def current() -> Activity:
    """This process' watchdog, or an object with its methods where none is at work."""
    works = _watchdog is not None and not _watchdog._closing.is_set()
    return (_watchdog if works else alone.current()) or Activity(DEFAULT_HEALTH)


@contextlib.contextmanager
def reporting() -> Iterator[None]:
    """Send an error that ends this rank to the others, so that none of them waits for it.

    A UserError becomes SystemExit once it has been printed.
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
