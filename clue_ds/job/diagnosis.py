"""What is wrong with a job: kinds, exit statuses, and how rank 0 finds the rank that is to blame.

Guarantees: a diagnosis names ranks and hosts, and shows the last known stack of each rank that it
blames. There are no threads, no clock and no store here, so each rule can be tested by itself.
"""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from clue_ds import dist
from clue_ds.job.rendezvous import Peer
from clue_ds.launcher import contract
from clue_ds.settings.sections import HealthSection

STATUS = {
    "user error": contract.STATUS_USER_ERROR,
    "exception": contract.STATUS_EXCEPTION,
    "died": contract.STATUS_DIED,
    "hang": contract.STATUS_HANG,
    "unreachable": contract.STATUS_UNREACHABLE,
}
# A rank whose stack contains one of these is waiting for other ranks.
COLLECTIVE = ("torch/distributed/", "deepspeed/comm/", "job/watchdog.py", "job/agreement.py")
FAILED_COLLECTIVE = re.compile(
    "gloo|nccl|ProcessGroup|Connection (closed|reset)|Broken pipe", re.IGNORECASE
)
MAX_RANKS_SHOWN = 8
# Used for a rank that has not sent a heartbeat yet.
NO_HEARTBEAT: dict[str, Any] = {
    "number": 0,
    "step": 0,
    "section": "setup",
    "stuck_s": 0.0,
    "overdue": False,
    "idle_s": float("inf"),
    "stack": [],
    "suspicion": None,
    "neighbours": {},
}


class Diagnosis(NamedTuple):
    """`summary`: one sentence with rank and host; `details`: lines with stacks."""

    kind: str
    status: int
    ranks: list[int]
    summary: str
    details: list[str]


def make(
    kind: str, text: str, ranks: list[int], peers: list[Peer], stacks: dict[str, list[str]]
) -> Diagnosis:
    """A diagnosis that blames `ranks`; its sentence is their names and then `text`."""
    if not ranks:
        return Diagnosis(kind, STATUS[kind], ranks, text, [])
    shown = ranks[:MAX_RANKS_SHOWN]
    names = ", ".join(f"rank {rank} on {peers[rank].host}" for rank in shown)
    more = f" and {len(ranks) - len(shown)} more" if len(ranks) > len(shown) else ""
    details = []
    for rank in shown:
        stack = stacks.get(str(rank))
        if stack:
            name = f"rank {rank} on {peers[rank].host} (pid {peers[rank].pid})"
            details += [f"  last known stack of {name}, innermost call last:"]
            details += [f"    {line}" for line in stack]
    return Diagnosis(kind, STATUS[kind], ranks, f"{names}{more} {text}", details)


def silence(state: str | None, seconds: float) -> str:
    """Why a rank sends no heartbeats; `state`: of its process, as a rank on its host sees it."""
    if state == "stopped":
        return f"is stopped (SIGSTOP) and has been silent for {seconds:.0f} s"
    if state == "dead":
        return "was killed or interrupted, or has crashed (out of memory? see `dmesg` on that host)"
    if state == "alive":
        return (
            f"has been silent for {seconds:.0f} s, although its process exists: it is in a C call "
            "that holds Python's lock, or waits for a disk or swap that does not respond"
        )
    return (
        f"has been silent for {seconds:.0f} s: its process was stopped or killed, or that host or "
        "the network link to it is down"
    )


def kind_of_silence(state: str | None) -> str:
    """The kind of diagnosis for a rank that sends no heartbeats."""
    return {"stopped": "hang", "alive": "hang", "dead": "died"}.get(state or "", "unreachable")


def is_failed_collective(error: BaseException) -> bool:
    """Whether another rank is likely to be the cause of an exception."""
    return FAILED_COLLECTIVE.search(f"{type(error).__name__} {error}") is not None


def raised(error: BaseException) -> str:
    """How a diagnosis describes an exception on a rank."""
    where = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(where[-1].filename).name}:{where[-1].lineno})" if where else ""
    return f"raised {type(error).__name__}: {str(error)[:500]}{place}"


class Monitor:
    """Rank 0's view of all ranks; it is called once per round of heartbeats."""

    def __init__(self, peers: list[Peer], health: HealthSection, suspicious_seconds: float) -> None:
        self._peers, self.health, self._suspicious = peers, health, suspicious_seconds
        self._heard: dict[int, tuple[int, float]] = {}
        self._last_round: float | None = None

    def check(
        self, heartbeats: list[dict[str, Any]], gone: set[int], now: float
    ) -> Diagnosis | None:
        """A diagnosis, or None while all is well. `gone`: ranks that have ended normally."""
        self._forgive_own_pause(now)
        silent = {}
        suspicion = next((b["suspicion"] for b in heartbeats if b["suspicion"]), None)
        limit = self._suspicious if suspicion else self.health.beat_seconds
        for rank, heartbeat in enumerate(heartbeats):
            number, since = self._heard.get(rank, (-1, now))
            if number != heartbeat["number"]:
                self._heard[rank] = (heartbeat["number"], now)
            elif rank not in gone and now - since > limit:
                silent[rank] = now - since
        states = _states_seen_by([b for rank, b in enumerate(heartbeats) if rank not in silent])
        dead = [rank for rank, state in states.items() if state == "dead" and rank not in gone]
        if dead:
            return self._diagnose("died", dead, silence("dead", 0), heartbeats)
        if silent:
            return self._about_silent(silent, states, suspicion, heartbeats)
        # When one rank hangs in a step, those that wait for it are overdue too.
        overdue = [
            r for r, heartbeat in enumerate(heartbeats) if heartbeat["overdue"] and r not in gone
        ]
        if overdue:
            return self._about_hang(heartbeats[overdue[0]]["stuck_s"], heartbeats, gone)
        # Ranks that wait for one that saves are idle; the job goes on as long as any rank is not.
        idle = min((b["idle_s"] for r, b in enumerate(heartbeats) if r not in gone), default=0.0)
        return self._about_hang(idle, heartbeats, gone) if idle > self.health.step_seconds else None

    def _forgive_own_pause(self, now: float) -> None:
        """Don't count time in which rank 0 itself was not running as silence of other ranks."""
        if self._last_round is not None:
            pause = now - self._last_round - 5.0
            if pause > 0:
                self._heard = {r: (n, t + pause) for r, (n, t) in self._heard.items()}
        self._last_round = now

    def _diagnose(
        self, kind: str, ranks: list[int], text: str, heartbeats: list[dict[str, Any]]
    ) -> Diagnosis:
        stacks = {str(rank): heartbeats[rank]["stack"] for rank in ranks}
        return make(kind, text, ranks, self._peers, stacks)

    def _about_silent(
        self,
        silent: dict[int, float],
        states: dict[int, str],
        suspicion: str | None,
        heartbeats: list[dict[str, Any]],
    ) -> Diagnosis:
        ranks = sorted(silent)
        state = states.get(ranks[0])
        closed = suspicion is not None and ("closed" in suspicion or "reset" in suspicion)
        if state != "stopped" and closed:
            state = "dead"  # its kernel closed the connection, so the host itself works
        text = silence(state, silent[ranks[0]])
        return self._diagnose(kind_of_silence(state), ranks, text, heartbeats)

    def _about_hang(
        self, seconds: float, heartbeats: list[dict[str, Any]], gone: set[int]
    ) -> Diagnosis:
        alive = [rank for rank in range(len(heartbeats)) if rank not in gone]
        odd = odd_ones_out({rank: heartbeats[rank] for rank in alive})
        others = len(alive) - len(odd)
        heartbeat = heartbeats[odd[0]]
        text = f"hangs: no progress for {seconds:.0f} s in {heartbeat['section']}"
        if heartbeat["step"]:
            text += f" after step {heartbeat['step']}"
        if others:
            text += f", and the other {others} rank{'s wait' if others > 1 else ' waits'}"
        return self._diagnose("hang", odd, text, heartbeats)


def _states_seen_by(heartbeats: list[dict[str, Any]]) -> dict[int, str]:
    """State of processes, as seen by ranks on the same host that send heartbeats."""
    return {
        int(r): state for heartbeat in heartbeats for r, state in heartbeat["neighbours"].items()
    }


def waits(stack: list[str]) -> bool:
    """Whether a rank with this stack is waiting for other ranks."""
    return any(name in line for line in stack for name in COLLECTIVE)


def odd_ones_out(heartbeats: dict[int, dict[str, Any]]) -> list[int]:
    """Ranks to blame for a hang: those behind in steps, or not waiting, or unlike the majority."""
    steps = {rank: heartbeat["step"] for rank, heartbeat in heartbeats.items()}
    behind = [rank for rank, step in steps.items() if step < max(steps.values())]
    if behind:
        return behind
    stacks = {rank: "\n".join(heartbeat["stack"]) for rank, heartbeat in heartbeats.items()}
    waiting = {rank for rank, heartbeat in heartbeats.items() if waits(heartbeat["stack"])}
    if waiting and len(waiting) < len(heartbeats):
        return [rank for rank in heartbeats if rank not in waiting]
    commonest, count = Counter(stacks.values()).most_common(1)[0]
    if 2 * count > len(stacks) and count < len(stacks):
        return [rank for rank, stack in stacks.items() if stack != commonest]
    return list(heartbeats)


def write(diagnosis: Diagnosis) -> bool:
    """Write the diagnosis for the launcher; False if there already is one, or no launcher."""
    directory = dist.job_dir()
    if directory is None:
        return False
    draft = directory / f"{contract.VERDICT_FILE}.{dist.rank()}"
    draft.write_text(json.dumps(diagnosis._asdict()), encoding="utf-8")
    try:
        os.link(draft, directory / contract.VERDICT_FILE)
    except FileExistsError:
        return False
    finally:
        draft.unlink()
    return True


def report(diagnosis: Diagnosis, command: str) -> None:
    """Print the diagnosis: on rank 0, on the rank that wrote it, or anywhere without a launcher."""
    if diagnosis.kind == "user error":
        return
    first = write(diagnosis)
    alone = dist.job_dir() is None
    if first or alone or dist.rank() == 0:
        lines = [f"{command}: error: {diagnosis.summary}", *diagnosis.details]
        sys.stderr.write("\n".join(lines) + "\n")
        sys.stderr.flush()
