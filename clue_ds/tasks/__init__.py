"""What a trained encoder is for: filling masks, embedding, classifying."""

from clue_ds.tasks.predict import Predictor

__all__ = ["Predictor"]
