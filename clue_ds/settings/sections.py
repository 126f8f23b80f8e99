"""The sections of a config that say what happens around the loop: evaluate, save, log, watch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class EvaluateSection(Section):
    """How often the model is evaluated on held-out text, and on how much of it."""

    every: int = Field(
        1_000, ge=1, description="steps between evaluations; the last step is always evaluated"
    )
    batches: int = Field(
        20, ge=1, description="global batches per evaluation (all of the text, if it has fewer)"
    )


class CheckpointSection(Section):
    """How often the run is saved, and how many checkpoints are kept."""

    every: int = Field(
        1_000, ge=1, description="steps between checkpoints; the last step is always saved"
    )
    keep: int = Field(
        2, ge=1, description="number of newest checkpoints to keep; older ones are deleted"
    )
    keep_every: int = Field(
        0, ge=0, description="also keep each one whose step is a multiple of this; 0: none"
    )
    keep_best: bool = Field(
        False, description="also keep the one with the lowest held-out loss (checkpoints/best)"
    )
    async_save: bool = Field(
        True,
        description="copy the state to host memory, and write it while training goes on; false: "
        "training waits, and no memory is needed",
    )


class LogSection(Section):
    """What is written during training."""

    every: int = Field(10, ge=1, description="steps between log lines")
    seconds: float = Field(
        30, gt=0, description="longest time between log lines, besides the one of every first step"
    )
    tensorboard: bool = Field(True, description="also write TensorBoard files to RUN/tensorboard")
    trackers: list[Literal["wandb", "swanlab", "mlflow"]] = Field(
        [], description="also send everything to these trackers: wandb, swanlab, mlflow"
    )


class HealthSection(Section):
    """Deadlines in seconds. When one passes, the job ends and names the rank that is to blame."""

    start_seconds: float = Field(60, gt=0, description="time for all ranks to connect at start")
    beat_seconds: float = Field(60, ge=10, description="a rank's longest time without a heartbeat")
    step_seconds: float = Field(
        100,
        gt=0,
        description="longest step (or 5 times the slowest so far, if that is more), and longest "
        "time without progress while loading, saving or evaluating",
    )
    setup_seconds: float = Field(
        900, gt=0, description="longest stage of the setup, even if it makes progress"
    )
    save_seconds: float = Field(
        900, gt=0, description="longest stage of saving or evaluating, even if it makes progress"
    )


DEFAULT_HEALTH = HealthSection()
