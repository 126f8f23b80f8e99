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
    scaling,
    serve,
    shard,
    tokenizer,
)

COMMANDS: dict[str, Callable[..., None]] = {
    "tokenizer": tokenizer.tokenizer,
    "shard": shard.shard,
    "loader": loader.loader,
    "cold": cold.cold,
    "scale": scale.scale,
    "pretrain": pretrain.pretrain,
    "scaling": scaling.scaling,
    "kernels": kernels.kernels,
    "finetune": finetune.finetune,
    "evidence": evidence.evidence,
    "serve": serve.serve,
}
