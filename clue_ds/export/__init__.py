"""Conversion between clue_ds and the layouts that other programs read and write.

`load` reads a run, a checkpoint, a Hugging Face directory or a directory in Google's TensorFlow
layout into one form: a ModelConfig and an fp32 state dict with transformers' names. `save` writes
that form. The verbs `export` and `import` are in command.py.

The public names are imported when they are first used, so that the help of a verb needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from clue_ds.settings.lazy import importer

if TYPE_CHECKING:
    from clue_ds.export.layouts import LAYOUTS, load, save
    from clue_ds.export.sources import OpenedModel, open_model, opened
    from clue_ds.model.finetuned import FineTuned

__all__ = ["LAYOUTS", "FineTuned", "OpenedModel", "load", "open_model", "opened", "save"]

__getattr__ = importer(
    __name__,
    {
        "LAYOUTS": "clue_ds.export.layouts",
        "FineTuned": "clue_ds.model.finetuned",
        "OpenedModel": "clue_ds.export.sources",
        "load": "clue_ds.export.layouts",
        "open_model": "clue_ds.export.sources",
        "opened": "clue_ds.export.sources",
        "save": "clue_ds.export.layouts",
    },
)
