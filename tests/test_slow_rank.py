"""A slow rank is named with its host; healthy ones that differ a little are not."""

from __future__ import annotations

import random
import socket
import time
from pathlib import Path
from typing import Any

import torch
from ranks import make_corpus, read_log, run_ranks, tiny_config

from clue_ds.job.slow_rank import STEPS_PER_ROUND, SlowRanks

NOT_SLOW = 20  # steps before rank 1 becomes slow
WITHIN = 50


def judge_rounds(rounds: list[list[float]], step_seconds: float = 0.1) -> list[str | None]:
    hosts = [f"host{rank}" for rank in range(len(rounds[0]))]
    ranks = SlowRanks(hosts, torch.device("cpu"), waits_in_forward=False)
    return [
        ranks.judge(STEPS_PER_ROUND * number, by_rank, step_seconds)
        for number, by_rank in enumerate(rounds, start=1)
    ]


def test_a_rank_that_is_twice_as_slow_is_named_in_the_second_round() -> None:
    healthy, slow = [0.03] * 8, [0.03] * 5 + [0.06] + [0.03] * 2
    notes = judge_rounds([healthy, healthy, slow, slow, slow])
    assert [note is not None for note in notes] == [False, False, False, True, False]
    assert notes[3] is not None
    assert "slow at step 64: rank 5 on host5 needs 60.0 ms per step for its batch" in notes[3]
    assert "2.0 times the median of the other ranks (30.0 ms)" in notes[3]
    # Two ranks: the median of all would be 45 ms, and nobody twice as slow as that.
    assert judge_rounds([[0.03, 0.06]] * 3)[2] is not None
    # A round may begin just before the rank becomes slow, and then does not count.
    assert 3 * STEPS_PER_ROUND <= WITHIN


def test_a_slow_rank_is_named_again_after_a_thousand_steps() -> None:
    notes = judge_rounds([[0.03, 0.06]] * (1_100 // STEPS_PER_ROUND))
    assert sum(note is not None for note in notes) == 2


def test_pauses_noise_and_slow_beginnings_name_nobody() -> None:
    draw = random.Random(0)
    noisy = [[0.03 * draw.lognormvariate(0, 0.1) for _ in range(8)] for _ in range(500)]
    assert not any(judge_rounds(noisy))
    healthy, paused = [0.03] * 4, [0.03, 0.03, 0.3, 0.03]
    assert not any(judge_rounds([healthy, paused, healthy, paused, healthy]))
    assert not any(judge_rounds([[0.3, 0.03, 0.03, 0.03], paused, healthy]))
    # Twice as long, but nothing of a step.
    assert not any(judge_rounds([[0.0001, 0.0002]] * 9))


def one_rank_becomes_slow(values: dict[str, Any]) -> list[str]:
    """On every rank: what rank 0 says while rank 1 needs much longer for a forward pass."""
    from clue_ds import config as run_config
    from clue_ds.pretrain import train

    notes: list[str] = []
    run = train.build(run_config.validate(values, "test config"))
    run.writers.note = notes.append
    calls = []

    def dawdle(module: Any, arguments: Any) -> None:
        calls.append(0)
        if torch.distributed.get_rank() == 1 and len(calls) > NOT_SLOW:
            time.sleep(0.08)

    run.engine.module.register_forward_pre_hook(dawdle)
    train.train(run)
    run.loader.close()
    run.writers.close()
    return notes


def test_a_real_rank_that_is_slow_is_named_within_50_steps(
    tmp_path: Path, sample_text: str
) -> None:
    corpus = make_corpus(tmp_path, sample_text)
    steps = NOT_SLOW + WITHIN
    train = {"steps": steps, "global_batch_size": 4}
    own = {"train": train, "checkpoint": {"every": 1_000}, "log": {"every": 10}}
    config = tiny_config(corpus, tmp_path / "run", **own)
    notes, _ = run_ranks(2, one_rank_becomes_slow, config.model_dump())
    (note,) = [note for note in notes if "slow at step" in note and "rank 1 on" in note]
    assert f"rank 1 on {socket.gethostname()} needs" in note
    assert int(note.split("slow at step ")[1].split(":")[0]) <= steps
    assert read_log(tmp_path / "run")[-1]["slowest_rank"] == 1
