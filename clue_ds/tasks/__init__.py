"""Using a trained encoder: fine-tune it, fill masks, embed, classify, serve, submit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clue_ds.tasks.predict.predictor import Predictor

__all__ = ["Predictor"]


def __getattr__(name: str) -> Any:
    """The public name, imported when it is first used, because it needs torch."""
    if name != "Predictor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from clue_ds.tasks.predict.predictor import Predictor

    return Predictor
