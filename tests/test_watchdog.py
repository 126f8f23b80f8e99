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

# The real entry, with an accident on rank 1: in pre-flight, setup, the fourth step, or saving.
CHILD = """
import os, signal, sys, time
from pathlib import Path
from clue_ds import dist
from clue_ds.pretrain import checkpoint, train
from clue_ds.pretrain.engine import Engine

def read_from_a_dead_disk():
    time.sleep(1000)

def write_for_a_long_time():
    for _ in range(60):
        Path(sys.argv[-1]).with_name("slow").write_text("x")
        time.sleep(0.2)

ACCIDENTS = {
    "hangs": read_from_a_dead_disk,
    "is stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "is slow": write_for_a_long_time,
}

def accident(place):
    if dist.rank() == 1 and place == sys.argv[2]:
        if sys.argv[1] == "raises":
            raise ValueError("the third shard is unreadable")
        ACCIDENTS[sys.argv[1]]()

steps, step, save, build = [], Engine.step, checkpoint.save, train.build_model
all_reduce = dist.all_reduce
def broken_step(self, lr):
    steps.append(lr)
    if len(steps) > 3:
        accident("step")
    return step(self, lr)
def broken_save(*arguments):
    accident("save")
    return save(*arguments)
def broken_build(*arguments):
    accident("setup")
    return build(*arguments)
def broken_all_reduce(*arguments):  # pre-flight's is the first
    accident("pre-flight")
    return all_reduce(*arguments)
Engine.step, checkpoint.save, train.build_model = broken_step, broken_save, broken_build
dist.all_reduce = broken_all_reduce
train.main(sys.argv[3:])
"""


def run_with(
    accident: str, corpus: Path, folder: Path, place: str = "step", steps: int = 10_000
) -> list[tuple[int, str]]:
    """Exit status and standard error of both ranks; a rank 1 that is stopped is then killed."""
    config = tiny_config(
        corpus,
        folder / "run",
        deepspeed="zero0",
        train={"steps": steps, "warmup_steps": 2},
        checkpoint={"every": 5 if place == "save" else 10_000},
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
        command = [
            sys.executable,
            "-c",
            CHILD,
            accident,
            place,
            "--config",
            str(folder / "run.yaml"),
        ]
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
        statuses = [ranks[0].wait(timeout=PATIENCE_S)]
        if accident == "is stopped":
            ranks[1].kill()
        statuses.append(ranks[1].wait(timeout=PATIENCE_S))
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


@pytest.mark.parametrize("place", ["setup", "save"])
def test_a_stopped_rank_is_noticed_in_every_phase(corpus: Path, tmp_path: Path, place: str) -> None:
    (status, said), _ = run_with("is stopped", corpus, tmp_path, place)
    assert status == 72, said
    assert f"rank 1 on {socket.gethostname()} is stopped (SIGSTOP)" in said


@pytest.mark.parametrize("place", ["setup", "save"])
def test_a_rank_that_hangs_outside_of_steps_does_not_take_longer(
    corpus: Path, tmp_path: Path, place: str
) -> None:
    """save_seconds and setup_seconds, 900, are for ranks that work."""
    (status_0, said_0), (status_1, _) = run_with("hangs", corpus, tmp_path, place)
    assert (status_0, status_1) == (72, 72), said_0
    assert f"rank 1 on {socket.gethostname()} hangs: no progress for" in said_0
    assert f" s in {place} after step" in said_0
    assert "read_from_a_dead_disk" in said_0


def test_a_rank_that_is_missing_from_the_pre_flight_all_reduce_is_named(
    corpus: Path, tmp_path: Path
) -> None:
    (status, said), _ = run_with("hangs", corpus, tmp_path, "pre-flight")
    assert status == 72, said
    assert f"rank 1 on {socket.gethostname()} hangs: no progress for" in said
    assert "in the pre-flight all-reduce" in said


def test_a_long_save_that_gets_on_is_no_hang(corpus: Path, tmp_path: Path) -> None:
    """12 s of saving on one rank, for which the other waits, with a deadline of 5 s."""
    results = run_with("is slow", corpus, tmp_path, "save", steps=5)
    assert [status for status, _ in results] == [0, 0], results
