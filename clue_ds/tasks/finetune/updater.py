"""Fine-tuning on several ranks: the engine of pretraining, without ZeRO's sharding.

The models that are fine-tuned fit each rank whole, and stage 0 keeps torch's own optimizer, so that
the state file is the same as for one process.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clue_ds import config as run_config
from clue_ds import dist
from clue_ds.config import RunConfig
from clue_ds.errors import UserError
from clue_ds.pretrain.engine import Engine
from clue_ds.tasks.heads import BertForSequenceClassification


class RanksUpdater:
    """What training.LocalUpdater does, on all ranks of the process group together."""

    def __init__(
        self,
        network: BertForSequenceClassification,
        batch_size: int,
        weight_decay: float,
        gradient_clipping: float,
        num_steps: int,
    ) -> None:
        if batch_size % dist.world_size():
            raise UserError(
                f"a batch of {batch_size} examples can't be shared by {dist.world_size()} ranks; "
                "give a --batch-size that divides"
            )
        device = next(network.parameters()).device
        values = _config(batch_size, weight_decay, gradient_clipping, num_steps)
        self.engine = Engine(network, values, device)
        self.network: Any = self.engine.module

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.engine.deepspeed.optimizer

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.engine.forward(**inputs)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self, lr: float) -> None:
        self.engine.step(lr)


def _config(
    batch_size: int, weight_decay: float, gradient_clipping: float, num_steps: int
) -> RunConfig:
    """What the engine reads of a pretraining run's config."""
    train = {
        "steps": num_steps,
        "global_batch_size": batch_size,
        "micro_batch_size": batch_size // dist.world_size(),
        "warmup_steps": 0,
        "weight_decay": weight_decay,
        "gradient_clipping": gradient_clipping,
    }
    values = {"run_dir": "-", "deepspeed": "zero0", "data": {"corpus": "-"}, "train": train}
    return run_config.validate(values, "fine-tuning on ranks")
