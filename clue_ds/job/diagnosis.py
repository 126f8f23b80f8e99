"""What is wrong with a job: kinds, exit statuses, and how rank 0 finds the rank to blame.

Guarantees: a verdict names ranks and hosts, and shows the last known stack of each odd one out. No
threads, no clock and no store here, so that every rule can be tested by itself.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from clue_ds import dist
from clue_ds.config import HealthSection
from clue_ds.job.rendezvous import Peer
from clue_ds.launcher import contract

STATUS = {
    "user error": contract.STATUS_USER_ERROR,
    "exception": contract.STATUS_EXCEPTION,
    "died": contract.STATUS_DIED,
    "hang": contract.STATUS_HANG,
    "unreachable": contract.STATUS_UNREACHABLE,
}
# A stack that has one of these in it is waiting for other ranks.
COLLECTIVE = ("torch/distributed/", "deepspeed/comm/", "job/watchdog.py")
MAX_RANKS_SHOWN = 8
# In place of the beats of a rank that has not sent any yet.
NO_BEAT: dict[str, Any] = {
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


class Verdict(NamedTuple):
    """`summary`: a sentence with rank and host; `details`: lines with stacks."""

    kind: str
    status: int
    ranks: list[int]
    summary: str
    details: list[str]


def make(
    kind: str, text: str, ranks: list[int], peers: list[Peer], stacks: dict[str, list[str]]
) -> Verdict:
    """A verdict about `ranks`; `text` follows their names."""
    if not ranks:
        return Verdict(kind, STATUS[kind], ranks, text, [])
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
    return Verdict(kind, STATUS[kind], ranks, f"{names}{more} {text}", details)


def silence(state: str | None, seconds: float) -> str:
    """What a rank that sends no beats is doing; `state`: what a neighbour sees of its process."""
    if state == "stopped":
        return f"is stopped (SIGSTOP) and has been silent for {seconds:.0f} s"
    if state == "dead":
        return "was killed or has crashed (out of memory? `dmesg` on that host tells)"
    if state == "alive":
        return (
            f"has been silent for {seconds:.0f} s, though its process is there: a call into C "
            "that keeps Python's lock, or a disk or swap that doesn't answer"
        )
    return (
        f"has been silent for {seconds:.0f} s: its process was stopped or killed, or that host or "
        "the link to it is down"
    )


def kind_of_silence(state: str | None) -> str:
    """The kind of a verdict on a rank that sends no beats."""
    return {"stopped": "hang", "alive": "hang", "dead": "died"}.get(state or "", "unreachable")


def raised(error: BaseException) -> str:
    """What an exception on a rank is called in a verdict."""
    where = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(where[-1].filename).name}:{where[-1].lineno})" if where else ""
    return f"raised {type(error).__name__}: {str(error)[:500]}{place}"


class Judge:
    """Rank 0's view of all ranks, one call a round of beats."""

    def __init__(self, peers: list[Peer], health: HealthSection, suspicious_seconds: float) -> None:
        self._peers, self.health, self._suspicious = peers, health, suspicious_seconds
        self._heard: dict[int, tuple[int, float]] = {}
        self._last_round: float | None = None

    def judge(self, beats: list[dict[str, Any]], gone: set[int], now: float) -> Verdict | None:
        """A verdict, or None while all is well. `gone`: ranks that have taken leave."""
        self._forgive_own_pause(now)
        silent = {}
        suspicion = next((b["suspicion"] for b in beats if b["suspicion"]), None)
        limit = self._suspicious if suspicion else self.health.beat_seconds
        for rank, beat in enumerate(beats):
            number, since = self._heard.get(rank, (-1, now))
            if number != beat["number"]:
                self._heard[rank] = (beat["number"], now)
            elif rank not in gone and now - since > limit:
                silent[rank] = now - since
        seen = _neighbours_say([b for rank, b in enumerate(beats) if rank not in silent])
        dead = [rank for rank, state in seen.items() if state == "dead" and rank not in gone]
        if dead:
            return self._verdict("died", dead, silence("dead", 0), beats)
        if silent:
            return self._about_silent(silent, seen, suspicion, beats)
        # One alone is late at the end of a step; all are when something hangs.
        overdue = [r for r, beat in enumerate(beats) if beat["overdue"] and r not in gone]
        if overdue:
            return self._about_hang(beats[overdue[0]]["stuck_s"], beats, gone)
        # While one saves, the others may wait for it as long as it works.
        idle = min((b["idle_s"] for r, b in enumerate(beats) if r not in gone), default=0.0)
        return self._about_hang(idle, beats, gone) if idle > self.health.step_seconds else None

    def _forgive_own_pause(self, now: float) -> None:
        """Time in which rank 0 itself was not running is nobody's silence."""
        if self._last_round is not None:
            pause = now - self._last_round - 5.0
            if pause > 0:
                self._heard = {r: (n, t + pause) for r, (n, t) in self._heard.items()}
        self._last_round = now

    def _verdict(
        self, kind: str, ranks: list[int], text: str, beats: list[dict[str, Any]]
    ) -> Verdict:
        stacks = {str(rank): beats[rank]["stack"] for rank in ranks}
        return make(kind, text, ranks, self._peers, stacks)

    def _about_silent(
        self,
        silent: dict[int, float],
        seen: dict[int, str],
        suspicion: str | None,
        beats: list[dict[str, Any]],
    ) -> Verdict:
        ranks = sorted(silent)
        state = seen.get(ranks[0])
        closed = suspicion is not None and ("closed" in suspicion or "reset" in suspicion)
        if state != "stopped" and closed:
            state = "dead"  # its kernel closed the connection, so the host is there
        text = silence(state, silent[ranks[0]])
        return self._verdict(kind_of_silence(state), ranks, text, beats)

    def _about_hang(self, seconds: float, beats: list[dict[str, Any]], gone: set[int]) -> Verdict:
        alive = [rank for rank in range(len(beats)) if rank not in gone]
        odd = odd_ones_out({rank: beats[rank] for rank in alive})
        others = len(alive) - len(odd)
        beat = beats[odd[0]]
        text = f"hangs: no progress for {seconds:.0f} s in {beat['section']}"
        if beat["step"]:
            text += f" after step {beat['step']}"
        if others:
            text += f", and the other {others} rank{'s wait' if others > 1 else ' waits'}"
        return self._verdict("hang", odd, text, beats)


def _neighbours_say(beats: list[dict[str, Any]]) -> dict[int, str]:
    """What ranks that can be believed see of processes on their own host."""
    return {int(r): state for beat in beats for r, state in beat["neighbours"].items()}


def waits(stack: list[str]) -> bool:
    """Whether a rank is waiting for others, by its stack."""
    return any(name in line for line in stack for name in COLLECTIVE)


def odd_ones_out(beats: dict[int, dict[str, Any]]) -> list[int]:
    """Ranks to blame for a hang: behind by steps, else not waiting for others, else unlike most."""
    steps = {rank: beat["step"] for rank, beat in beats.items()}
    behind = [rank for rank, step in steps.items() if step < max(steps.values())]
    if behind:
        return behind
    stacks = {rank: "\n".join(beat["stack"]) for rank, beat in beats.items()}
    waiting = {rank for rank, beat in beats.items() if waits(beat["stack"])}
    if waiting and len(waiting) < len(beats):
        return [rank for rank in beats if rank not in waiting]
    commonest, count = Counter(stacks.values()).most_common(1)[0]
    if 2 * count > len(stacks) and count < len(stacks):
        return [rank for rank, stack in stacks.items() if stack != commonest]
    return list(beats)


def write(verdict: Verdict) -> bool:
    """Leave the verdict for the launcher; False when there is one already, or no launcher."""
    directory = dist.job_dir()
    if directory is None:
        return False
    draft = directory / f"{contract.VERDICT_FILE}.{dist.rank()}"
    draft.write_text(json.dumps(verdict._asdict()), encoding="utf-8")
    try:
        os.link(draft, directory / contract.VERDICT_FILE)
    except FileExistsError:
        return False
    finally:
        draft.unlink()
    return True


def report(verdict: Verdict, command: str) -> None:
    """Print it, on the rank whose verdict the launcher got, or on every rank without one."""
    if verdict.kind == "user error":
        return
    first = write(verdict)
    alone = dist.job_dir() is None
    if first or alone or dist.rank() == 0:
        lines = [f"{command}: error: {verdict.summary}", *verdict.details]
        sys.stderr.write("\n".join(lines) + "\n")
        sys.stderr.flush()
