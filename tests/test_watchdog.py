"""Two ranks of a real run, one of which fails: the other ends and names it."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import pytest
from ranks import make_corpus, tiny_config
from zygote import Zygote

from clue_ds import config as run_config

# How rank 1 fails, and where; `place` is the second argument of the script.
ACCIDENTS = """
import json, os, signal, sys, time
from pathlib import Path
from clue_ds import dist

def read_from_a_dead_disk():
    time.sleep(1000)

def spin_for_ever():
    while True:
        pass

def write_for_a_long_time():
    for _ in range(60):
        Path(sys.argv[-1]).with_name("slow").write_text("x")
        time.sleep(0.4)

def get_signals(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)

def die_under_a_launcher_that_notices():
    lock = json.loads(Path(sys.argv[-1]).with_name("run").joinpath("alive.json").read_text())
    if os.fork() == 0:  # the launcher: it sends TERM to rank 0
        time.sleep(0.3)
        os.kill(lock["pid"], signal.SIGTERM)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)

def raise_an_error():
    raise ValueError("the third shard is unreadable")

DO = {
    "raises": raise_an_error,
    "dies": die_under_a_launcher_that_notices,
    "gets TERM": lambda: get_signals(signal.SIGTERM),
    "gets INT and TERM": lambda: get_signals(signal.SIGINT, signal.SIGTERM),
    "hangs": read_from_a_dead_disk,
    "spins": spin_for_ever,
    "is stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "is slow": write_for_a_long_time,
}

def breaks(place, function, after=0):
    calls = []
    def broken(*arguments, **named):
        calls.append(place)
        if dist.rank() == 1 and place == sys.argv[2] and len(calls) > after:
            DO[sys.argv[1]]()
        return function(*arguments, **named)
    return broken
"""

# The real entry of pretraining.
PRETRAIN = """
from clue_ds.pretrain import saving, train
from clue_ds.pretrain.engine import Engine

train.build_model = breaks("setup", train.build_model)
dist.all_reduce = breaks("pre-flight", dist.all_reduce)  # pre-flight's is the first
Engine.step = breaks("step", Engine.step, after=3)
saving.Saver.save = breaks("save", saving.Saver.save)
saving.Saver._write_files = breaks("background", saving.Saver._write_files)  # in a thread
train.main(sys.argv[3:])
"""


def two_ranks(
    zygote: Zygote, script: str, accident: str, place: str, arguments: list[str], folder: Path
) -> list[tuple[int, str]]:
    """Exit status and standard error of both ranks; a stopped rank 1 is killed in the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    variables = [{**common, "RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    logs = [folder / "0.err", folder / "1.err"]
    statuses = zygote.run(ACCIDENTS + script, [accident, place, *arguments], variables, logs)
    return [(status, log.read_text()) for status, log in zip(statuses, logs, strict=True)]


def run_with(
    zygote: Zygote,
    accident: str,
    corpus: Path,
    folder: Path,
    place: str = "step",
    steps: int = 10_000,
) -> list[tuple[int, str]]:
    """Exit status and standard error of both ranks of a pretraining run."""
    config = tiny_config(
        corpus,
        folder / "run",
        deepspeed="zero0",
        train={"steps": steps, "warmup_steps": 2},
        checkpoint={"every": 5 if place in ("save", "background") else 10_000},
        health={"beat_seconds": 20, "step_seconds": 15},
    )
    run_config.save(config, folder / "run.yaml")
    arguments = ["--config", str(folder / "run.yaml")]
    return two_ranks(zygote, PRETRAIN, accident, place, arguments, folder)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> Path:
    return make_corpus(tmp_path_factory.mktemp("watchdog"), sample_text)


def test_an_exception_on_one_rank_ends_the_others(
    zygote: Zygote, corpus: Path, tmp_path: Path
) -> None:
    (status_0, said_0), (status_1, said_1) = run_with(zygote, "raises", corpus, tmp_path)
    assert (status_0, status_1) == (70, 70)
    assert f"rank 1 on {socket.gethostname()} raised ValueError: the third shard" in said_0
    assert "Traceback" in said_1 and "Traceback" not in said_0


def test_an_error_in_the_background_of_one_rank_ends_the_run_and_publishes_nothing(
    zygote: Zygote, corpus: Path, tmp_path: Path
) -> None:
    results = run_with(zygote, "raises", corpus, tmp_path, place="background")
    assert [status for status, _ in results] == [70, 70], results
    assert "ValueError: the third shard is unreadable" in results[1][1], results
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("accident", ["gets TERM", "gets INT and TERM"])
def test_a_signal_to_one_rank_lets_all_save_and_stop_without_our_launcher(
    zygote: Zygote, corpus: Path, tmp_path: Path, accident: str
) -> None:
    """They used to end with 143 and 71, and nothing saved."""
    results = run_with(zygote, accident, corpus, tmp_path)
    assert [status for status, _ in results] == [75, 75], results
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    assert (checkpoint / "manifest.json").is_file()
    assert not (tmp_path / "run" / "alive.json").exists()


def test_term_after_another_rank_has_died_ends_the_job(
    zygote: Zygote, corpus: Path, tmp_path: Path
) -> None:
    """As torchrun and DeepSpeed's launcher send it: waiting for the next step would be a hang."""
    (status, said), (died, _) = run_with(zygote, "dies", corpus, tmp_path)
    assert (status, died) == (71, -signal.SIGKILL)
    assert f"rank 1 on {socket.gethostname()} was killed or interrupted, or has crashed" in said
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_rank_that_hangs_is_told_from_those_that_wait(
    zygote: Zygote, corpus: Path, tmp_path: Path
) -> None:
    (status_0, said_0), (status_1, said_1) = run_with(zygote, "hangs", corpus, tmp_path)
    assert (status_0, status_1) == (72, 72)
    assert f"rank 1 on {socket.gethostname()} hangs: no progress" in said_0
    assert "read_from_a_dead_disk" in said_0  # its last known stack
    assert "read_from_a_dead_disk" in said_1  # its own dump


@pytest.mark.parametrize("place", [pytest.param("setup", marks=pytest.mark.heavy), "save"])
def test_a_stopped_rank_is_noticed_in_every_phase(
    zygote: Zygote, corpus: Path, tmp_path: Path, place: str
) -> None:
    (status, said), _ = run_with(zygote, "is stopped", corpus, tmp_path, place)
    assert status == 72, said
    assert f"rank 1 on {socket.gethostname()} is stopped (SIGSTOP)" in said


@pytest.mark.parametrize(
    ("accident", "place", "where"),
    [
        pytest.param("hangs", "save", "read_from_a_dead_disk", marks=pytest.mark.heavy),
        pytest.param("spins", "setup", "spin_for_ever", marks=pytest.mark.heavy),
        ("spins", "save", "spin_for_ever"),
        ("hangs", "background", "read_from_a_dead_disk"),
    ],
)
def test_a_rank_that_hangs_outside_of_steps_does_not_take_longer(
    zygote: Zygote, corpus: Path, tmp_path: Path, accident: str, place: str, where: str
) -> None:
    """save_seconds and setup_seconds (900) apply to ranks with progress; a busy loop has none."""
    (status_0, said_0), (status_1, _) = run_with(zygote, accident, corpus, tmp_path, place)
    assert (status_0, status_1) == (72, 72), said_0
    assert f"rank 1 on {socket.gethostname()} hangs: no progress for" in said_0
    # The next save waits for the one in the background.
    assert f" s in {'save' if place == 'background' else place}" in said_0
    assert f"in {where}" in said_0


def test_a_rank_that_is_missing_from_the_pre_flight_all_reduce_is_named(
    zygote: Zygote, corpus: Path, tmp_path: Path
) -> None:
    (status, said), _ = run_with(zygote, "hangs", corpus, tmp_path, "pre-flight")
    assert status == 72, said
    assert f"rank 1 on {socket.gethostname()} hangs: no progress for" in said
    assert "in the pre-flight all-reduce" in said


def test_a_long_save_that_gets_on_is_no_hang(zygote: Zygote, corpus: Path, tmp_path: Path) -> None:
    """24 s of saving on one rank, for which the other waits, with a deadline of 15 s."""
    results = run_with(zygote, "is slow", corpus, tmp_path, "save", steps=5)
    assert [status for status, _ in results] == [0, 0], results
