"""The YAML file that describes a user's own task of the kind `tag`."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field, model_validator

from clue_ds.tasks.kinds.base import TaskFile, refuse_repeated
from clue_ds.tasks.kinds.tag import schemes
from clue_ds.tasks.kinds.tag.schemes import Scheme
from clue_ds.tasks.task import SMALL_MODEL_EPOCHS, SMALL_MODEL_LR, Settings, Task

Head = Literal["softmax", "pointer"]
Overlapping = Literal["refuse", "skip", "keep"]


class CustomTagTask(TaskFile):
    """The keys of the file. `labels` are the types of entities, without B- and I-."""

    model_config = ConfigDict(coerce_numbers_to_str=True)  # labels may be numbers

    text: str = "text"
    labels: list[str] = Field(min_length=1)
    label: str = "label"
    scheme: Scheme = "bio"
    head: Head = "softmax"
    overlapping: Overlapping = "refuse"
    metric: Literal["span_f1", "text_set_f1"] = "span_f1"
    max_length: int = Field(Settings.max_length, ge=8)
    batch_size: int = Field(Settings.batch_size, ge=1)
    lr: float | None = Field(None, gt=0)
    epochs: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _check(self) -> CustomTagTask:
        refuse_repeated(self.labels)
        prefixed = [label for label in self.labels if label == "O" or label[:2] in PREFIXED]
        if prefixed:
            raise ValueError(
                f"labels {', '.join(prefixed)} are tags; list the types only, such as PER for "
                "B-PER and I-PER"
            )
        if self.overlapping == "keep" and self.head != "pointer":
            raise ValueError("overlapping: keep needs head: pointer, because a token has one tag")
        if self.head == "pointer" and self.scheme != "bio":
            raise ValueError("head: pointer has no tags, so leave out scheme")
        return self


PREFIXED = tuple(f"{prefix}-" for prefix in "BIESMLU")


def custom_task(given: CustomTagTask) -> Task:
    """The task that a valid file describes."""
    plain, small = (
        Settings(given.max_length, given.batch_size, given.lr or lr, given.epochs or epochs)
        for lr, epochs in ((Settings.lr, Settings.epochs), (SMALL_MODEL_LR, SMALL_MODEL_EPOCHS))
    )
    is_pointer = given.head == "pointer"
    return Task(
        given.name,
        "tag",
        (given.text,),
        tuple(given.labels) if is_pointer else schemes.tags(given.labels, given.scheme),
        plain,
        small,
        label_field=given.label,
        metric=given.metric,
        options={"head": given.head, "overlapping": given.overlapping},
    )
