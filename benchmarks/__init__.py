"""`clue-ds bench ...`: end-to-end comparisons with named peers; figures lie in results/."""

from __future__ import annotations

from collections.abc import Callable

from clue_ds.benchmarks import (
    cold,
    evidence,
    finetune,
    kernels,
    loader,
    pretrain,
    scale,
    serve,
)

COMMANDS: dict[str, Callable[..., None]] = {
    "pretrain": pretrain.pretrain,
    "loader": loader.loader,
    "cold": cold.cold,
    "scale": scale.scale,
    "kernels": kernels.kernels,
    "finetune": finetune.finetune,
    "evidence": evidence.evidence,
    "serve": serve.serve,
}
