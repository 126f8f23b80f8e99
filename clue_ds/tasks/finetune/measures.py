"""How well classes were predicted: accuracy, F1, and what guessing would have scored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np


def confusion(truth: Sequence[int], predictions: Sequence[int], num_classes: int) -> np.ndarray:
    """Counts [true class, predicted class], int64."""
    cells = np.asarray(truth) * num_classes + np.asarray(predictions)
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def f1_of_classes(counts: np.ndarray) -> np.ndarray:
    """F1 of every class of a confusion matrix; 0 for one that never occurs and is never said."""
    right = np.diag(counts).astype(float)
    said_or_true = counts.sum(0) + counts.sum(1)
    return np.divide(2 * right, said_or_true, out=np.zeros_like(right), where=said_or_true > 0)


def scores(truth: Sequence[int], predictions: Sequence[int], num_classes: int) -> dict[str, float]:
    """accuracy; f1: the mean over the classes that occur (macro F1), so rare ones count alike."""
    counts = confusion(truth, predictions, num_classes)
    occurs = counts.sum(1) > 0
    return {
        "accuracy": float(np.trace(counts) / counts.sum()),
        "f1": float(f1_of_classes(counts)[occurs].mean()),
    }


def majority(train: Sequence[int], dev: Sequence[int], num_classes: int) -> dict[str, float]:
    """The scores on dev of always saying the commonest class of train."""
    commonest = Counter(train).most_common(1)[0][0]
    return scores(dev, [commonest] * len(dev), num_classes)
