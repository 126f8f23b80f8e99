"""When a run notices a request to stop."""

from __future__ import annotations

import pytest

from clue_ds.job import stop
from clue_ds.job.stop import StopRequest


class Clock:
    """time.monotonic in the hands of a test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(stop.time, "monotonic", lambda: self.now)


def steps_until_heard(request: StopRequest, clock: Clock, first: int, seconds: float) -> int:
    """Steps of `seconds` from `first` on until a request that is there is agreed on."""
    request.ask()
    for number in range(5_000):
        clock.now += seconds
        if request.agreed(first + number):
            return number + 1
    raise AssertionError("never heard")


@pytest.mark.parametrize(("seconds", "at_most"), [(5.0, 1), (0.1, 11), (1e-4, 1_001)])
def test_about_once_a_second(seconds: float, at_most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    request = StopRequest()
    for step in range(1, 3_000):
        clock.now += seconds
        assert not request.agreed(step)
    assert steps_until_heard(request, clock, 3_000, seconds) <= at_most


def test_a_resumed_run_hears_it_in_its_first_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of earlier processes and the time to set up say nothing about the pace."""
    clock = Clock(monkeypatch)
    request = StopRequest()
    clock.now += 30.0
    assert not request.agreed(100_001)
    assert steps_until_heard(request, clock, 100_002, 5.0) == 1


def test_a_second_signal_ends_a_run_but_not_the_copy_that_a_launcher_passes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C reaches the ranks from the terminal and, a moment later, from torchrun."""
    clock = Clock(monkeypatch)
    for launched in (False, True):
        monkeypatch.setattr(stop.dist, "is_launched", lambda given=launched: given)
        request = StopRequest()
        assert request.ask_by_signal() and request.is_asked()
        clock.now += 0.5
        assert request.ask_by_signal() == launched
        clock.now += stop.SECONDS_OF_ONE_REQUEST
        assert not request.ask_by_signal()


def test_the_next_run_of_a_process_counts_its_steps_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    request = StopRequest()
    for step in range(1, 3_000):
        clock.now += 0.01
        assert not request.agreed(step)
    request.begin()
    assert steps_until_heard(request, clock, 1, 0.01) == 1
