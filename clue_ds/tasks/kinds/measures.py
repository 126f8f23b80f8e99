"""How well classes were predicted: accuracy, F1, and the scores of the majority class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

MAJORITY = "always predicting the most frequent label"


def confusion(truth: Sequence[int], predictions: Sequence[int], num_classes: int) -> np.ndarray:
    """Counts [true class, predicted class], int64."""
    cells = np.asarray(truth) * num_classes + np.asarray(predictions)
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def f1_of_classes(counts: np.ndarray) -> np.ndarray:
    """F1 of every class of a confusion matrix; 0 for one that is neither true nor predicted."""
    right = np.diag(counts).astype(float)
    predicted_and_true = counts.sum(0) + counts.sum(1)
    return np.divide(
        2 * right, predicted_and_true, out=np.zeros_like(right), where=predicted_and_true > 0
    )


def scores(truth: Sequence[int], predictions: Sequence[int], num_classes: int) -> dict[str, float]:
    """accuracy, and f1: the mean F1 over the classes that occur (macro F1).

    Rare classes count as much in it as frequent ones.
    """
    counts = confusion(truth, predictions, num_classes)
    occurs = counts.sum(1) > 0
    return {
        "accuracy": float(np.trace(counts) / counts.sum()),
        "f1": float(f1_of_classes(counts)[occurs].mean()),
    }


def majority(train: Sequence[int], dev: Sequence[int], num_classes: int) -> dict[str, float]:
    """The scores on dev of always predicting the most frequent class of train."""
    most_frequent = Counter(train).most_common(1)[0][0]
    return scores(dev, [most_frequent] * len(dev), num_classes)
