"""The run lock: held on this machine or another, left by a killed run, half written, lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from clue_ds.job import procfs, rendezvous, run_lock
from clue_ds.job.rendezvous import Peer

ME = rendezvous.myself()
ELSEWHERE = Peer("another-host", 7, "pid:[1]")


@pytest.fixture
def end() -> Iterator[threading.Event]:
    """Ends the locks of this test."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """Another process of this machine."""
    other = subprocess.Popen(["sleep", "60"])
    yield other
    other.kill()
    other.wait()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "SECONDS_BETWEEN_TOUCHES", 0.2)
    monkeypatch.setattr(run_lock, "SECONDS_UNTIL_DEAD", 1.5)
    monkeypatch.setattr(run_lock, "SECONDS_BETWEEN_LOOKS", 0.05)


def leave(folder: Path, peer: Peer) -> Path:
    """The lock of a run that was killed."""
    killed = threading.Event()
    killed.set()
    assert run_lock.claim(folder, peer, killed) is None
    return folder / run_lock.FILE


def test_a_living_process_of_this_machine_keeps_others_out_and_a_dead_one_does_not(
    tmp_path: Path, end: threading.Event, process: subprocess.Popen[bytes]
) -> None:
    assert run_lock.claim(tmp_path, ME._replace(pid=process.pid), end) is None
    refusal = run_lock.claim(tmp_path, ME, end)
    assert refusal is not None and f"kill -USR1 {process.pid})" in refusal
    process.kill()
    process.wait()
    assert run_lock.claim(tmp_path, ME, end) is None
    # The next run of the same process, after one that failed.
    assert run_lock.claim(tmp_path, ME, end) is None


def test_a_stopped_process_of_this_machine_keeps_others_out_however_old_its_lock_is(
    tmp_path: Path, end: threading.Event, process: subprocess.Popen[bytes]
) -> None:
    """Ctrl-Z for 35 s used to let a second run in."""
    path = leave(tmp_path, ME._replace(pid=process.pid))
    os.utime(path, (0, 0))
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)
    refusal = run_lock.claim(tmp_path, ME, end)
    assert refusal is not None and f"process {process.pid} on" in refusal
    assert "is stopped (Ctrl-Z or SIGSTOP) while it trains in it. Let it continue" in refusal
    assert f"(kill -CONT {process.pid})" in refusal


def test_a_number_that_belongs_to_another_process_now_keeps_nobody_out(
    tmp_path: Path, end: threading.Event, process: subprocess.Popen[bytes]
) -> None:
    path = leave(tmp_path, ME._replace(pid=process.pid))
    values = json.loads(path.read_text())
    assert values["started"] == procfs.started(process.pid) > 0
    path.write_text(json.dumps(values | {"started": values["started"] - 1}))
    assert run_lock.claim(tmp_path, ME, end) is None


def test_a_lock_of_an_earlier_version_is_understood(
    tmp_path: Path, end: threading.Event, process: subprocess.Popen[bytes]
) -> None:
    path = tmp_path / run_lock.FILE
    path.write_text(json.dumps(ME._replace(pid=process.pid)._asdict()) + "\n")
    assert run_lock.claim(tmp_path, ME, end) is not None
    process.kill()
    process.wait()
    assert run_lock.claim(tmp_path, ME, end) is None
    # What status and the earlier versions read.
    assert json.loads(path.read_text()).items() >= ME._asdict().items()


def test_a_process_elsewhere_holds_it_as_long_as_the_file_changes_whatever_the_clocks_say(
    tmp_path: Path,
    end: threading.Event,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A clock 40 s ahead of the file server's used to admit a second run at once."""
    assert run_lock.claim(tmp_path, ELSEWHERE, end) is None
    now = time.time
    for ahead in (3_600, 0, -3_600):
        monkeypatch.setattr(time, "time", lambda ahead=ahead: now() + ahead)
        refusal = run_lock.claim(tmp_path, ME, end)
        assert refusal is not None and "process 7 on another-host" in refusal
    assert "to see if that run is alive" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, "", '{"host": "a", "pid": 1}\n'])
def test_what_was_left_by_a_killed_run_keeps_nobody_out_for_long(
    tmp_path: Path, end: threading.Event, content: str | None
) -> None:
    if content is None:
        path = leave(tmp_path, ELSEWHERE)
        os.utime(path, (2**32, 2**32))
    else:
        (tmp_path / run_lock.FILE).write_text(content)
    began = time.monotonic()
    assert run_lock.claim(tmp_path, ME, end) is None
    assert time.monotonic() - began > 1
    assert [path.name for path in tmp_path.iterdir()] == [run_lock.FILE]


@pytest.mark.parametrize("is_dead_lock_there", [False, True])
def test_of_several_that_start_at_once_one_trains(
    tmp_path: Path, end: threading.Event, is_dead_lock_there: bool
) -> None:
    processes = [subprocess.Popen(["sleep", "60"]) for _ in range(4)]
    gone = subprocess.Popen(["true"])
    gone.wait()
    try:
        for number in range(20):
            folder = tmp_path / str(number)
            folder.mkdir()
            if is_dead_lock_there:
                path = leave(folder, ME._replace(pid=gone.pid))
                if number % 2:  # and one of those that came before was killed in its way
                    token = json.loads(path.read_text())["token"]
                    text = path.read_text().replace(token, "killed")
                    path.with_name(f"{run_lock.FILE}.{token}").write_text(text)
            answers: list[str | None] = []
            together = threading.Barrier(len(processes))

            def claim(me: Peer, folder: Path = folder) -> None:
                together.wait()  # noqa: B023
                answers.append(run_lock.claim(folder, me, end))  # noqa: B023

            peers = [ME._replace(pid=process.pid) for process in processes]
            threads = [threading.Thread(target=claim, args=(peer,)) for peer in peers]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert sum(answer is None for answer in answers) == 1, answers
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_holder_that_lost_its_lock_says_so_and_leaves_the_new_one_alone(
    tmp_path: Path, end: threading.Event
) -> None:
    """A paused virtual machine: afterwards the second run's lock used to be deleted."""
    told: list[str] = []
    noticed = threading.Event()

    def on_loss(message: str) -> None:
        told.append(message)
        noticed.set()

    assert run_lock.claim(tmp_path, ME, end, on_loss) is None
    assert run_lock.lost(tmp_path) is None
    path = tmp_path / run_lock.FILE
    values = json.loads(path.read_text())
    draft = tmp_path / "draft"
    draft.write_text(json.dumps({**values, **ELSEWHERE._asdict(), "token": "another"}))
    draft.replace(path)
    assert "process 7 on another-host has taken over" in (run_lock.lost(tmp_path) or "")
    assert noticed.wait(20) and told == [run_lock.lost(tmp_path)]
    run_lock.withdraw(tmp_path)
    assert json.loads(path.read_text())["token"] == "another"
    assert [each.name for each in tmp_path.iterdir()] == [run_lock.FILE]
