"""Learning rate schedules: pure functions of the step.

Guarantees: there is no state to save or restore, so a run that resumes at step S has the same
learning rate as an uninterrupted one. Step numbers start at 0. The warm-up is linear and reaches
the peak in update number `warmup_steps`. The first update of a warm-up already changes the weights,
and the last update of a run still has a scale above `min_lr_ratio`.

Rejected: the scheduler objects of DeepSpeed and torch, which count calls and must be saved.
"""

from __future__ import annotations

import math

from clue_ds.config import TrainSection


def lr_scale(
    step: int,
    *,
    steps: int,
    warmup_steps: int,
    schedule: str,
    decay_steps: int = 0,
    min_lr_ratio: float = 0.0,
) -> float:
    """Learning rate of update `step` (0 to steps - 1) divided by the peak, in (0, 1].

    linear and cosine decay from the end of the warm-up to the end of the run; wsd (warm-up, stable,
    decay) stays at the peak and decays linearly over the last `decay_steps` updates.
    """
    assert 0 <= step < steps, (step, steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    falling = decay_steps if schedule == "wsd" else steps - warmup_steps
    # 0 at the last update with the peak rate, 1 at the update after the end of the run.
    progress = max(0, step - (steps - falling)) / max(1, falling)
    if schedule == "cosine":
        remaining = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        remaining = 1.0 - progress
    return min_lr_ratio + (1.0 - min_lr_ratio) * remaining


def learning_rate(train: TrainSection, step: int) -> float:
    """Learning rate of update `step` of this run."""
    return train.lr * lr_scale(
        step,
        steps=train.steps,
        warmup_steps=train.warmup_steps,
        schedule=train.schedule,
        decay_steps=train.decay_steps,
        min_lr_ratio=train.min_lr_ratio,
    )
