"""What counts as progress of the main thread: marks and bytes, but not processor time."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from clue_ds.job.heartbeat import Activity
from clue_ds.settings.sections import DEFAULT_HEALTH


def spin(seconds: float) -> None:
    """Use the processor for so long, however crowded the machine is."""
    began = time.thread_time()
    while time.thread_time() - began < seconds:
        pass


def idle(activity: Activity) -> float:
    """Asked from another thread, as the watchdog does: to look is to read files."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: activity.report()["idle_s"]).result()


def test_a_thread_that_spins_makes_no_progress_and_one_that_writes_does(tmp_path: Path) -> None:
    activity = Activity(DEFAULT_HEALTH)
    idle(activity)  # what was read and written before
    activity.mark()
    spin(0.3)
    # Clocks of the kernel: a tick of 10 ms either way, and its statistics lag a little.
    assert idle(activity) > 0.2
    (tmp_path / "file").write_bytes(bytes(1000))
    assert idle(activity) < 0.1
    spin(0.3)
    activity.mark()
    assert idle(activity) < 0.2


def test_while_the_main_thread_waits_for_another_one_only_that_one_counts(tmp_path: Path) -> None:
    """What the main thread reads meanwhile, in order to look, used to hide a dead disk."""
    activity, goes_on, ends = Activity(DEFAULT_HEALTH), threading.Event(), threading.Event()

    def write_and_wait() -> None:
        goes_on.wait()
        (tmp_path / "file").write_bytes(bytes(1000))
        ends.wait()

    thread = threading.Thread(target=write_and_wait)
    thread.start()
    with activity.waiting_for(thread):
        idle(activity)  # what was read and written before
        activity.mark()
        (tmp_path / "other").write_bytes(bytes(1000))
        time.sleep(0.2)
        assert idle(activity) > 0.1
        goes_on.set()
        while not (tmp_path / "file").exists() or idle(activity) > 0.1:
            pass
        assert any("in write_and_wait" in line for line in activity.report()["stack"])
        ends.set()
        thread.join()
    assert any("in test_while" in line for line in activity.report()["stack"])


def test_sections_have_their_own_deadlines_and_end(tmp_path: Path) -> None:
    activity = Activity(DEFAULT_HEALTH.model_copy(update={"save_seconds": 1e-9}))
    assert activity.report()["section"] == "setup" and not activity.report()["overdue"]
    assert not activity.step(3)
    with activity.section("save"):
        report = activity.report()
        assert report["section"] == "save" and report["overdue"] and report["step"] == 3
    assert activity.report()["section"] == "step" and not activity.report()["overdue"]
    assert activity.report()["idle_s"] == 0
    activity.begin(DEFAULT_HEALTH)
    assert activity.report()["section"] == "setup" and activity.report()["step"] == 0
