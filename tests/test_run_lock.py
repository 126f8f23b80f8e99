"""The run lock: held on this machine or another, left by a killed run, half written."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from clue_ds.job import rendezvous, run_lock
from clue_ds.job.rendezvous import Peer

ME = rendezvous.myself()
ELSEWHERE = Peer("another-host", 7, "pid:[1]")


@pytest.fixture
def end() -> Iterator[threading.Event]:
    """Ends the locks of this test."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "SECONDS_BETWEEN_TOUCHES", 0.3)
    monkeypatch.setattr(run_lock, "SECONDS_UNTIL_DEAD", 2.0)


def test_a_living_process_of_this_machine_keeps_others_out_and_a_dead_one_does_not(
    tmp_path: Path, end: threading.Event
) -> None:
    process = subprocess.Popen(["sleep", "60"])
    assert run_lock.claim(tmp_path, ME._replace(pid=process.pid), end) is None
    refusal = run_lock.claim(tmp_path, ME, end)
    assert refusal is not None and f"kill -USR1 {process.pid})" in refusal
    process.kill()
    process.wait()
    assert run_lock.claim(tmp_path, ME, end) is None
    # The next run of the same process, after one that failed.
    assert run_lock.claim(tmp_path, ME, end) is None


def test_the_next_touch_from_another_machine_is_waited_for(
    tmp_path: Path, end: threading.Event, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_lock.claim(tmp_path, ELSEWHERE, end) is None
    refusal = run_lock.claim(tmp_path, ME, end)
    assert refusal is not None and "process 7 on another-host" in refusal
    assert "to see if that run is alive" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, "", '{"host": "a", "pid": 1}\n'])
def test_what_was_left_by_a_killed_run_keeps_nobody_out_for_long(
    tmp_path: Path, end: threading.Event, content: str | None
) -> None:
    path = tmp_path / run_lock.FILE
    if content is None:
        killed = threading.Event()
        killed.set()
        assert run_lock.claim(tmp_path, ELSEWHERE, killed) is None
    else:
        path.write_text(content)
    began = time.monotonic()
    assert run_lock.claim(tmp_path, ME, end) is None
    assert time.monotonic() - began > 1
    os.utime(path, (0, 0))
    assert run_lock.claim(tmp_path, ELSEWHERE, end) is None


def test_of_two_that_start_at_once_one_trains(tmp_path: Path, end: threading.Event) -> None:
    process = subprocess.Popen(["sleep", "60"])
    peers = [ME, ME._replace(pid=process.pid)]
    answers: list[str | None] = []
    together = threading.Barrier(2)

    def claim(me: Peer) -> None:
        together.wait()
        answers.append(run_lock.claim(tmp_path, me, end))

    threads = [threading.Thread(target=claim, args=(peer,)) for peer in peers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    process.kill()
    process.wait()
    assert sum(answer is None for answer in answers) == 1
