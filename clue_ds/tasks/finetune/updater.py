"""Fine-tuning on several ranks with the engine of pretraining, without ZeRO's sharding.

The models that are fine-tuned fit on each rank as a whole. Stage 0 uses torch's own optimizer, so
a saved state is the same as that of a single process.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor, nn

from clue_ds import config as run_config
from clue_ds import dist
from clue_ds.config import TrainSection
from clue_ds.errors import UserError
from clue_ds.pretrain.engine import Engine


class Updater(Protocol):
    """What the loop of fine-tuning needs in order to move the weights of `network`."""

    @property
    def network(self) -> nn.Module: ...

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...

    def forward(self, **inputs: Tensor) -> Tensor:
        """Logits of a batch."""

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of the batch's loss."""

    def step(self, lr: float) -> None:
        """Update the weights and forget the gradients."""


class RanksUpdater:
    """The Updater that works on all ranks of the process group together."""

    def __init__(
        self,
        network: nn.Module,
        batch_size: int,
        weight_decay: float,
        gradient_clipping: float,
        num_steps: int,
    ) -> None:
        if batch_size % dist.world_size():
            raise UserError(
                f"a batch of {batch_size} examples can't be split over {dist.world_size()} ranks; "
                "give a --batch-size that is a multiple of the number of ranks"
            )
        device = next(network.parameters()).device
        train = run_config.validate_section(
            TrainSection,
            {
                "steps": num_steps,
                "global_batch_size": batch_size,
                "micro_batch_size": batch_size // dist.world_size(),
                "warmup_steps": 0,
                "precision": "fp32",  # of the weights; the forward pass has its own
                "weight_decay": weight_decay,
                "gradient_clipping": gradient_clipping,
            },
            "fine-tuning on several ranks",
        )
        zero0 = {"zero_optimization": {"stage": 0}}
        self.engine = Engine(network, train, zero0, "of fine-tuning", device)
        self.network = cast(nn.Module, self.engine.module)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.engine.optimizer

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.engine.forward(**inputs)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self, lr: float) -> None:
        self.engine.step(lr)
