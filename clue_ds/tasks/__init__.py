"""Using a trained encoder: fine-tune it, fill masks, embed, classify, serve, submit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clue_ds.settings.lazy import importer

if TYPE_CHECKING:
    from clue_ds.tasks.predict.predictor import Predictor

__all__ = ["Predictor"]

# Imported when it is first used, because it needs torch.
__getattr__ = importer(__name__, {"Predictor": "clue_ds.tasks.predict.predictor"})
