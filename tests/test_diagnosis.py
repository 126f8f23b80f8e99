"""Which rank is to blame: the rules of rank 0's monitor, on heartbeats as ranks send them."""

from __future__ import annotations

from typing import Any

from clue_ds.job import diagnosis
from clue_ds.job.rendezvous import Peer
from clue_ds.settings.sections import HealthSection

PEERS = [Peer(f"h{rank // 2}", 100 + rank, "ns") for rank in range(4)]
WAITING = ["train.py:90 in train", "/x/torch/distributed/distributed_c10d.py:1 in all_reduce"]
ELSEWHERE = ["train.py:80 in train", "/home/me/slow.py:7 in read"]


def heartbeat(number: int, **changes: Any) -> dict[str, Any]:
    usual = {
        "number": number,
        "step": 5,
        "section": "step",
        "stuck_s": 0.0,
        "overdue": False,
        "idle_s": 0.0,
        "stack": WAITING,
        "suspicion": None,
        "neighbours": {},
    }
    return {**usual, **changes}


def rounds(monitor: diagnosis.Monitor, silent: set[int], until: float, **of_0: Any) -> Any:
    """Heartbeats every two seconds, except from the silent ranks; (diagnosis, time)."""
    now, number = 0.0, 0
    while now <= until:
        number += 1
        heartbeats = [heartbeat(1 if rank in silent else number) for rank in range(4)]
        heartbeats[0] |= of_0
        found = monitor.check(heartbeats, set(), now)
        if found is not None:
            return found, now
        now += 2
    return None, now


def test_a_silent_rank_is_unreachable_after_the_deadline() -> None:
    found, seconds = rounds(diagnosis.Monitor(PEERS, HealthSection(), 8), {3}, 100)
    assert (found.kind, found.status, found.ranks) == ("unreachable", 73, [3])
    assert "rank 3 on h1" in found.summary
    assert 60 < seconds <= 64


def test_a_failed_collective_shortens_the_deadline() -> None:
    found, seconds = rounds(
        diagnosis.Monitor(PEERS, HealthSection(), 8),
        {3},
        100,
        suspicion="Connection closed by peer",
    )
    assert (found.kind, found.status) == ("died", 71)
    assert seconds <= 12


def test_a_neighbour_knows_what_became_of_a_process() -> None:
    found, seconds = rounds(
        diagnosis.Monitor(PEERS, HealthSection(), 8), set(), 9, neighbours={"1": "dead"}
    )
    assert (found.kind, found.ranks, seconds) == ("died", [1], 0)
    found, _ = rounds(
        diagnosis.Monitor(PEERS, HealthSection(), 8), {1}, 100, neighbours={"1": "stopped"}
    )
    assert (found.kind, found.status) == ("hang", 72)
    assert "SIGSTOP" in found.summary


def test_a_process_that_is_there_and_silent_hangs_if_a_rank_that_speaks_says_so() -> None:
    believed = {"1": "alive"}
    found, _ = rounds(diagnosis.Monitor(PEERS, HealthSection(), 8), {1}, 100, neighbours=believed)
    assert (found.kind, found.ranks) == ("hang", [1])
    assert "although its process exists" in found.summary
    monitor = diagnosis.Monitor(PEERS, HealthSection(), 8)
    for now in range(0, 100, 2):
        heartbeats = [
            heartbeat(now),
            heartbeat(now),
            heartbeat(1),
            heartbeat(1, neighbours={"2": "alive"}),
        ]
        found = monitor.check(heartbeats, set(), float(now))
        if found is not None:
            break
    assert found is not None
    assert (found.kind, found.ranks) == ("unreachable", [2, 3])  # their host is gone


def test_a_rank_that_stops_before_its_first_heartbeat_is_found() -> None:
    monitor = diagnosis.Monitor(PEERS, HealthSection(), 8)
    found = None
    for now in range(0, 100, 2):
        heartbeats = [*(heartbeat(now) for _ in range(3)), diagnosis.NO_HEARTBEAT]
        found = found or monitor.check(heartbeats, set(), float(now))
    assert found is not None
    assert (found.kind, found.ranks) == ("unreachable", [3])


def test_a_pause_of_rank_0_itself_is_nobodys_silence() -> None:
    monitor = diagnosis.Monitor(PEERS, HealthSection(), 8)
    heartbeats = [heartbeat(1) for _ in range(4)]
    assert monitor.check(heartbeats, set(), 0.0) is None
    assert monitor.check(heartbeats, set(), 300.0) is None


def test_a_rank_that_has_ended_is_not_missed() -> None:
    monitor = diagnosis.Monitor(PEERS, HealthSection(), 8)
    for now in range(0, 200, 2):
        heartbeats = [heartbeat(1 if rank == 2 else now) for rank in range(4)]
        assert monitor.check(heartbeats, {2}, float(now)) is None


def test_the_odd_one_out_of_a_hang_is_the_one_that_does_not_wait() -> None:
    monitor = diagnosis.Monitor(PEERS, HealthSection(), 8)
    heartbeats = [heartbeat(1, overdue=True, stuck_s=100.0) for _ in range(4)]
    heartbeats[2] |= {"stack": ELSEWHERE}
    found = monitor.check(heartbeats, set(), 0.0)
    assert found is not None
    assert (found.kind, found.ranks) == ("hang", [2])
    assert "rank 2 on h1 hangs: no progress for 100 s in step after step 5" in found.summary
    assert any("slow.py:7" in line for line in found.details)


def test_a_rank_behind_by_a_step_is_odd_even_if_it_waits() -> None:
    heartbeats = {rank: heartbeat(1, step=4 if rank == 1 else 5) for rank in range(4)}
    assert diagnosis.odd_ones_out(heartbeats) == [1]
    assert diagnosis.odd_ones_out({rank: heartbeat(1) for rank in range(4)}) == [0, 1, 2, 3]


def test_a_long_save_is_no_hang_while_one_rank_works() -> None:
    monitor = diagnosis.Monitor(PEERS, HealthSection(), 8)
    heartbeats = [heartbeat(1, section="save", idle_s=500.0) for _ in range(4)]
    heartbeats[0] |= {"idle_s": 3.0}
    assert monitor.check(heartbeats, set(), 0.0) is None
    heartbeats[0] |= {"idle_s": 101.0, "stack": ELSEWHERE}
    found = monitor.check(heartbeats, set(), 0.0)
    assert found is not None
    assert (found.kind, found.ranks) == ("hang", [0])
    assert "no progress for 101 s in save after step 5, and the other 3 ranks wait" in (
        found.summary
    )
