"""Who is to blame: the rules of rank 0's judge, on beats as ranks send them."""

from __future__ import annotations

from typing import Any

from clue_ds.config import HealthSection
from clue_ds.job import diagnosis
from clue_ds.job.rendezvous import Peer

PEERS = [Peer(f"h{rank // 2}", 100 + rank, "ns") for rank in range(4)]
WAITING = ["train.py:90 in train", "/x/torch/distributed/distributed_c10d.py:1 in all_reduce"]
ELSEWHERE = ["train.py:80 in train", "/home/me/slow.py:7 in read"]


def beat(number: int, **changes: Any) -> dict[str, Any]:
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


def rounds(judge: diagnosis.Judge, silent: set[int], until: float, **of_0: Any) -> Any:
    """Beats every two seconds, without new ones of the silent ranks; (verdict, time)."""
    now, number = 0.0, 0
    while now <= until:
        number += 1
        beats = [beat(1 if rank in silent else number) for rank in range(4)]
        beats[0] |= of_0
        verdict = judge.judge(beats, set(), now)
        if verdict is not None:
            return verdict, now
        now += 2
    return None, now


def test_a_silent_rank_is_unreachable_after_the_deadline() -> None:
    verdict, seconds = rounds(diagnosis.Judge(PEERS, HealthSection(), 8), {3}, 100)
    assert (verdict.kind, verdict.status, verdict.ranks) == ("unreachable", 73, [3])
    assert "rank 3 on h1" in verdict.summary
    assert 60 < seconds <= 64


def test_a_failed_collective_shortens_the_deadline() -> None:
    verdict, seconds = rounds(
        diagnosis.Judge(PEERS, HealthSection(), 8), {3}, 100, suspicion="Connection closed by peer"
    )
    assert (verdict.kind, verdict.status) == ("died", 71)
    assert seconds <= 12


def test_a_neighbour_knows_what_became_of_a_process() -> None:
    verdict, seconds = rounds(
        diagnosis.Judge(PEERS, HealthSection(), 8), set(), 9, neighbours={"1": "dead"}
    )
    assert (verdict.kind, verdict.ranks, seconds) == ("died", [1], 0)
    verdict, _ = rounds(
        diagnosis.Judge(PEERS, HealthSection(), 8), {1}, 100, neighbours={"1": "stopped"}
    )
    assert (verdict.kind, verdict.status) == ("hang", 72)
    assert "SIGSTOP" in verdict.summary


def test_a_process_that_is_there_and_silent_hangs_if_a_rank_that_speaks_says_so() -> None:
    believed = {"1": "alive"}
    verdict, _ = rounds(diagnosis.Judge(PEERS, HealthSection(), 8), {1}, 100, neighbours=believed)
    assert (verdict.kind, verdict.ranks) == ("hang", [1])
    assert "though its process is there" in verdict.summary
    judge = diagnosis.Judge(PEERS, HealthSection(), 8)
    for now in range(0, 100, 2):
        beats = [beat(now), beat(now), beat(1), beat(1, neighbours={"2": "alive"})]
        verdict = judge.judge(beats, set(), float(now))
        if verdict is not None:
            break
    assert verdict is not None
    assert (verdict.kind, verdict.ranks) == ("unreachable", [2, 3])  # their host is gone


def test_a_rank_that_stops_before_its_first_beat_is_found() -> None:
    judge = diagnosis.Judge(PEERS, HealthSection(), 8)
    verdict = None
    for now in range(0, 100, 2):
        beats = [*(beat(now) for _ in range(3)), diagnosis.NO_BEAT]
        verdict = verdict or judge.judge(beats, set(), float(now))
    assert verdict is not None
    assert (verdict.kind, verdict.ranks) == ("unreachable", [3])


def test_a_pause_of_rank_0_itself_is_nobodys_silence() -> None:
    judge = diagnosis.Judge(PEERS, HealthSection(), 8)
    beats = [beat(1) for _ in range(4)]
    assert judge.judge(beats, set(), 0.0) is None
    assert judge.judge(beats, set(), 300.0) is None


def test_a_rank_that_has_taken_leave_is_not_missed() -> None:
    judge = diagnosis.Judge(PEERS, HealthSection(), 8)
    for now in range(0, 200, 2):
        beats = [beat(1 if rank == 2 else now) for rank in range(4)]
        assert judge.judge(beats, {2}, float(now)) is None


def test_the_odd_one_out_of_a_hang_is_the_one_that_does_not_wait() -> None:
    judge = diagnosis.Judge(PEERS, HealthSection(), 8)
    beats = [beat(1, overdue=True, stuck_s=100.0) for _ in range(4)]
    beats[2] |= {"stack": ELSEWHERE}
    verdict = judge.judge(beats, set(), 0.0)
    assert verdict is not None
    assert (verdict.kind, verdict.ranks) == ("hang", [2])
    assert "rank 2 on h1 hangs: no progress for 100 s in step after step 5" in verdict.summary
    assert any("slow.py:7" in line for line in verdict.details)


def test_a_rank_behind_by_a_step_is_odd_even_if_it_waits() -> None:
    beats = {rank: beat(1, step=4 if rank == 1 else 5) for rank in range(4)}
    assert diagnosis.odd_ones_out(beats) == [1]
    assert diagnosis.odd_ones_out({rank: beat(1) for rank in range(4)}) == [0, 1, 2, 3]


def test_a_long_save_is_no_hang_while_one_rank_works() -> None:
    judge = diagnosis.Judge(PEERS, HealthSection(), 8)
    beats = [beat(1, section="save", idle_s=500.0) for _ in range(4)]
    beats[0] |= {"idle_s": 3.0}
    assert judge.judge(beats, set(), 0.0) is None
    beats[0] |= {"idle_s": 101.0, "stack": ELSEWHERE}
    verdict = judge.judge(beats, set(), 0.0)
    assert verdict is not None
    assert (verdict.kind, verdict.ranks) == ("hang", [0])
    assert "no progress for 101 s in save after step 5, and the other 3 ranks wait" in (
        verdict.summary
    )
