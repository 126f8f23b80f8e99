"""`clue-ds bench ...`: end-to-end comparisons with named peers; figures lie in results/."""

from __future__ import annotations

from collections.abc import Callable

from clue_ds.benchmarks import kernels, loader, pretrain, shard, tokenizer

COMMANDS: dict[str, Callable[..., None]] = {
    "pretrain": pretrain.pretrain,
    "loader": loader.loader,
    "shard": shard.shard,
    "tokenizer": tokenizer.tokenizer,
    "kernels": kernels.kernels,
}
