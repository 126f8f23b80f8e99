"""The trained parameters, their weight decay, and the optimizer.

Guarantees: weight decay is never applied to LayerNorm and biases; a parameter that gets no gradient
is in no group (a flattened AdamW would decay it towards 0); the groups and their order depend only
on the model, because checkpoints rely on them.

Rejected: DeepSpeed's own "optimizer" section. Its AdamW and Lamb are compiled at start (minutes on
a CPU), and its Lamb does not run there at all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from clue_ds.config import TrainSection
from clue_ds.errors import UserError

# Parameters that an objective does not use. Labelled pairs have a separate head.
WITHOUT_GRADIENT: dict[str, tuple[str, ...]] = {
    "mlm": ("bert.pooler.", "cls.seq_relationship."),
    "nsp": (),
    "sop": (),
    "pair": ("cls.seq_relationship.",),
}


def freeze_unused(model: nn.Module, objective: str = "mlm") -> list[str]:
    """Freeze the parameters that training for the objective does not use; returns their names."""
    frozen = []
    for name, parameter in model.named_parameters():
        if name.startswith(WITHOUT_GRADIENT[objective]):
            parameter.requires_grad_(False)
            frozen.append(name)
    return frozen


def group_names(model: nn.Module) -> list[list[str]]:
    """Names of the trained parameters: those with weight decay, then those without."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    # Every vector of a BERT is a bias or belongs to a LayerNorm, and nothing else is a vector.
    decaying = [name for name, p in trained if p.ndim >= 2]
    others = [name for name, p in trained if p.ndim < 2]
    return [decaying, others]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trained parameters as an optimizer's two groups: with weight decay, then without."""
    parameters = dict(model.named_parameters())
    return [
        {"params": [parameters[name] for name in names], "weight_decay": decay}
        for names, decay in zip(group_names(model), (weight_decay, 0.0), strict=True)
    ]


def build(train: TrainSection, model: nn.Module, stage: int, fused: bool) -> torch.optim.Optimizer:
    """The optimizer with its two parameter groups, at learning rate 0; the loop sets the rate.

    `fused`: one CUDA kernel per update; the parameters must be on a GPU.
    """
    groups = parameter_groups(model, train.weight_decay)
    # A rate of 0 makes the step that DeepSpeed 0.19.8 takes at start (bf16, stage 0) harmless.
    settings: dict[str, Any] = {"lr": 0.0, "betas": (train.beta1, train.beta2), "eps": train.eps}
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups, **settings, fused=True if fused else None)
    if stage != 0:
        raise UserError(
            f"train.optimizer lamb needs ZeRO stage 0, not {stage}: stages 1 to 3 flatten and cut "
            "the parameters, so LAMB could not compute the norm of each weight matrix; set "
            "deepspeed zero0, or train.optimizer adamw"
        )
    try:
        from pytorch_optimizer import Lamb
    except ImportError:
        raise UserError(
            "train.optimizer lamb needs the package pytorch_optimizer; "
            "run: pip install 'clue_ds[lamb]'"
        ) from None
    # weight_decouple=False is LAMB as published: the decay is part of the update whose norm counts.
    return Lamb(groups, **settings, weight_decouple=False)
