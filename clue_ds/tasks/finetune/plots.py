"""Plots of a run. They need matplotlib: pip install 'clue_ds[plots]'.

A class is shown by its name where the data has one, and by the number of its id where that is not
ASCII, because fonts with Chinese are rarely installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import matplotlib
import numpy as np

from clue_ds.tasks.finetune.directory import baselines, shown_scores
from clue_ds.tasks.kinds.measures import MAJORITY

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

MAX_TICKS = 30  # more class labels than this would overlap


def confusion(result: dict[str, Any], target: Path | BinaryIO) -> None:
    """The confusion matrix; each row shows how one true class was predicted, as fractions."""
    counts = np.array(result["confusion"], dtype=float)
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    names = [result["label_names"].get(label, label) for label in result["labels"]]
    labels = [n if n.isascii() else str(i) for i, n in enumerate(names)]
    size = float(np.clip(0.45 * len(labels) + 2.5, 4, 9))
    figure, axis = plt.subplots(figsize=(size + 1, size), layout="constrained")
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(labels) <= MAX_TICKS:
        axis.set_xticks(range(len(labels)), labels, rotation=60)
        axis.set_yticks(range(len(labels)), labels)
        for row, column in np.argwhere(counts > 0) if len(labels) <= 16 else []:
            shade = "white" if shares[row, column] > 0.5 else "black"
            text = f"{counts[row, column]:.0f}"
            axis.text(column, row, text, ha="center", va="center", color=shade, fontsize=8)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    accuracy, guess = result["best"]["accuracy"], baselines(result)[MAJORITY]["accuracy"]
    axis.set_title(f"{result['task']} dev: {accuracy:.1%} (majority class: {guess:.1%})")
    figure.colorbar(image, shrink=0.7, label="fraction of the true class")
    figure.savefig(target, dpi=110, format="png")
    plt.close(figure)


def curves(result: dict[str, Any], target: Path | BinaryIO) -> None:
    """The smoothed training loss by step; the scores on dev by epoch."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    losses = np.array(result["losses"])
    width = max(1, len(losses) // 50)
    smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
    left.plot(np.arange(len(smooth)) + width, smooth, linewidth=1.2)
    left.set_xlabel("step")
    left.set_ylabel("training loss" + (f", mean of {width} steps" if width > 1 else ""))
    epochs = [line["epoch"] for line in result["epochs"]]
    shown = shown_scores(result)
    for key, name in shown:
        right.plot(epochs, [line[key] for line in result["epochs"]], marker="o", label=name)
    for (name, scores), line in zip(baselines(result).items(), (":", "--", "-."), strict=False):
        right.axhline(scores[shown[0][0]], color="grey", linestyle=line, label=name)
    right.xaxis.set_major_locator(MaxNLocator(integer=True))  # 40 marks would overlap
    right.set_xlabel("epoch")
    right.set_ylabel("dev")
    right.legend()
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(target, dpi=110, format="png")
    plt.close(figure)
