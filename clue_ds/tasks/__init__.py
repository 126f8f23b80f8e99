"""Using a trained encoder: fine-tune it, fill masks, embed, classify, serve, submit."""

from clue_ds.tasks.predict.predictor import Predictor

__all__ = ["Predictor"]
