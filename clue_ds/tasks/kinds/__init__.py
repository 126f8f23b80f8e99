"""The kinds of tasks: how a record becomes inputs, the head, the loss, the answer, the metric.

The public names are imported when they are first used, so that the table of tasks, which names
kinds only, doesn't import their networks and torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from clue_ds.settings.lazy import importer

if TYPE_CHECKING:
    from clue_ds.tasks.kinds.base import Answer, Example, Kind
    from clue_ds.tasks.kinds.table import (
        CUSTOM_KINDS,
        KINDS,
        of,
        reads,
        trained_task,
        unnamed_task,
    )

__all__ = [
    "CUSTOM_KINDS",
    "KINDS",
    "Answer",
    "Example",
    "Kind",
    "of",
    "reads",
    "trained_task",
    "unnamed_task",
]

_OF_BASE = ("Answer", "Example", "Kind")

__getattr__ = importer(
    __name__,
    {name: f"{__name__}.{'base' if name in _OF_BASE else 'table'}" for name in __all__},
)
