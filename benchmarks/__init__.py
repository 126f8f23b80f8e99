"""`clue-ds bench ...`: end-to-end comparisons with named peers; figures lie in results/."""

from __future__ import annotations

from collections.abc import Callable

<<<<<<< HEAD
from clue_ds.benchmarks import cold, kernels, loader, pretrain, scale
=======
from clue_ds.benchmarks import kernels, loader, pretrain, serve
>>>>>>> main

COMMANDS: dict[str, Callable[..., None]] = {
    "pretrain": pretrain.pretrain,
    "loader": loader.loader,
    "cold": cold.cold,
    "scale": scale.scale,
    "kernels": kernels.kernels,
    "serve": serve.serve,
}
