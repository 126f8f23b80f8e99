"""What a trained encoder is for: filling masks, embedding, classifying."""

from clue_ds.tasks.predict.predictor import Predictor

__all__ = ["Predictor"]
