"""Two ranks of a real run, one of which goes wrong: the other ends, and says who it was."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import HERE, make_corpus, tiny_config

from clue_ds import config as run_config

PATIENCE_S = 120

# The real entry, with an accident on rank 1 after three steps.
CHILD = """
import os, sys, time
from clue_ds import dist
from clue_ds.pretrain import train
from clue_ds.pretrain.engine import Engine

def read_from_a_dead_disk():
    time.sleep(1000)

accident, steps, step = sys.argv[1], [], Engine.step
def broken_step(self, lr):
    steps.append(lr)
    if dist.rank() == 1 and len(steps) > 3:
        if accident == "raises":
            raise ValueError("the third shard is unreadable")
        read_from_a_dead_disk()
    return step(self, lr)
Engine.step = broken_step
train.main(sys.argv[2:])
"""


def run_with(accident: str, corpus: Path, folder: Path) -> list[tuple[int, str]]:
    """Exit status and standard error of both ranks."""
    config = tiny_config(
        corpus,
        folder / "run",
        deepspeed="zero0",
        train={"steps": 10_000, "warmup_steps": 2},
        health={"beat_seconds": 10, "step_seconds": 5},
    )
    run_config.save(config, folder / "run.yaml")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = []
    for rank in ("0", "1"):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": str(HERE)}
        command = [sys.executable, "-c", CHILD, accident, "--config", str(folder / "run.yaml")]
        ranks.append(
            subprocess.Popen(
                command,
                env={**os.environ, **variables},
                text=True,
                stdout=subprocess.DEVNULL,
                stderr=(folder / f"{rank}.err").open("w"),
            )
        )
    try:
        statuses = [rank.wait(timeout=PATIENCE_S) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return [(s, (folder / f"{r}.err").read_text()) for r, s in enumerate(statuses)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> Path:
    return make_corpus(tmp_path_factory.mktemp("watchdog"), sample_text)


def test_an_exception_on_one_rank_ends_the_others(corpus: Path, tmp_path: Path) -> None:
    (status_0, said_0), (status_1, said_1) = run_with("raises", corpus, tmp_path)
    assert (status_0, status_1) == (70, 70)
    assert f"rank 1 on {socket.gethostname()} raised ValueError: the third shard" in said_0
    assert "Traceback" in said_1 and "Traceback" not in said_0


def test_a_rank_that_hangs_is_told_from_those_that_wait(corpus: Path, tmp_path: Path) -> None:
    (status_0, said_0), (status_1, said_1) = run_with("hangs", corpus, tmp_path)
    assert (status_0, status_1) == (72, 72)
    assert f"rank 1 on {socket.gethostname()} hangs: no progress" in said_0
    assert "read_from_a_dead_disk" in said_0  # its last known stack
    assert "read_from_a_dead_disk" in said_1  # its own dump
