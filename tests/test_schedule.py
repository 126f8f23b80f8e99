"""Learning rate schedules are pure functions with the shape that their names promise."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clue_ds.pretrain.schedule import lr_scale


def scales(schedule: str, steps: int = 100, warmup: int = 10, **more: float) -> list[float]:
    settings = {"steps": steps, "warmup_steps": warmup, "schedule": schedule, **more}
    return [lr_scale(step, **settings) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_warm_up_is_linear_and_moves_from_the_first_step(schedule: str) -> None:
    expected = [(n + 1) / 10 for n in range(10)]
    assert scales(schedule, decay_steps=20 if schedule == "wsd" else 0)[:10] == expected


def test_linear_falls_evenly_to_the_end() -> None:
    values = scales("linear")
    drops = [a - b for a, b in zip(values[10:], values[11:], strict=False)]
    assert values[10] == 1.0
    assert drops == pytest.approx([1 / 90] * 89)
    assert values[-1] == pytest.approx(1 / 90)


def test_cosine_is_half_way_down_in_the_middle() -> None:
    values = scales("cosine", warmup=0)
    assert values[0] == 1.0
    assert values[50] == pytest.approx(0.5)
    assert values[25] == pytest.approx(1 - values[75], abs=1e-12)


def test_wsd_is_flat_then_linear() -> None:
    values = scales("wsd", decay_steps=20)
    assert set(values[10:81]) == {1.0}
    assert values[90] == pytest.approx(0.5)


def test_wsd_without_decay_stays_at_the_peak() -> None:
    assert set(scales("wsd")[10:]) == {1.0}


@given(
    schedule=st.sampled_from(["linear", "cosine", "wsd"]),
    steps=st.integers(1, 500),
    warmup=st.floats(0, 1),
    decay=st.floats(0, 1),
    floor=st.floats(0, 1),
)
def test_scale_stays_above_the_floor_and_never_rises_after_warm_up(
    schedule: str, steps: int, warmup: float, decay: float, floor: float
) -> None:
    warmup_steps = int(warmup * steps)
    decay_steps = int(decay * (steps - warmup_steps)) if schedule == "wsd" else 0
    values = scales(schedule, steps, warmup_steps, decay_steps=decay_steps, min_lr_ratio=floor)
    assert all(0 < value <= 1 + 1e-12 for value in values)
    after = values[warmup_steps:]
    assert all(b <= a + 1e-12 for a, b in zip(after, after[1:], strict=False))
    assert all(value >= floor - 1e-12 for value in after)
