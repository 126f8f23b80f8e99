"""The trained parameters, their weight decay, and the optimizer.

Guarantees: weight decay is never applied to LayerNorm and biases; a parameter that gets no gradient
is in no group (a flattened AdamW would decay it towards 0); the groups and their order depend only
on the model, because checkpoints rely on them.

Rejected: DeepSpeed's own "optimizer" section. Its AdamW and Lamb are compiled at start (minutes on
a CPU), and its Lamb does not run there at all; its Muon (see muon.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from clue_ds.config import TrainSection
from clue_ds.errors import UserError
from clue_ds.pretrain.muon import MuonAdamW

# What Muon updates: matrices between two layers. Embeddings (and the decoder, which is tied to
# them), pooler and heads are not in it.
MUON_PREFIXES = ("bert.encoder.", "cls.predictions.transform.")
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


def is_muon(name: str, parameter: nn.Parameter) -> bool:
    """Whether `train.optimizer: muon` updates the parameter with Muon, and not with AdamW."""
    return parameter.ndim == 2 and name.startswith(MUON_PREFIXES)


def group_names(model: nn.Module, optimizer: str = "adamw") -> list[list[str]]:
    """Names of the trained parameters: those with weight decay, then those without.

    With the optimizer muon, the matrices that Muon updates come first, as a group of their own.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    muon = [name for name, p in trained if optimizer == "muon" and is_muon(name, p)]
    # Every vector of a BERT is a bias or belongs to a LayerNorm, and nothing else is a vector.
    decaying = [name for name, p in trained if p.ndim >= 2 and name not in muon]
    others = [name for name, p in trained if p.ndim < 2]
    return [*([muon] if muon else []), decaying, others]


def parameter_groups(
    model: nn.Module, weight_decay: float, optimizer: str = "adamw"
) -> list[dict[str, Any]]:
    """The trained parameters as an optimizer's groups, in the order of `group_names`."""
    parameters = dict(model.named_parameters())
    names_by_group = group_names(model, optimizer)
    decays = [weight_decay] * (len(names_by_group) - 1) + [0.0]
    return [
        {"params": [parameters[name] for name in names], "weight_decay": decay}
        for names, decay in zip(names_by_group, decays, strict=True)
    ]


def updates_on_device(train: TrainSection, stage: int, offload: bool) -> bool:
    """Whether an update is made without the host waiting for it (see update/)."""
    if train.optimizer != "adamw" or offload:
        return False
    return train.precision in {0: ("fp32",), 1: ("fp32", "bf16")}.get(stage, ())


def build(
    train: TrainSection, model: nn.Module, stage: int, device: torch.device, offload: bool = False
) -> torch.optim.Optimizer:
    """The optimizer with its parameter groups, at learning rate 0; `set_rate` sets the rate.

    Without `offload` AdamW is one kernel per update. `device` is that of the model.
    """
    fused = None if offload else True
    groups = parameter_groups(model, train.weight_decay, train.optimizer)
    # A rate of 0 makes the step that DeepSpeed 0.19.8 takes at start (bf16, stage 0) harmless.
    settings: dict[str, Any] = {"lr": 0.0, "betas": (train.beta1, train.beta2), "eps": train.eps}
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups, **settings, fused=fused)
    if train.optimizer == "muon":
        matrices, *others = groups
        for group in others:
            group["lr_ratio"] = (train.adamw_lr or train.lr / 2) / train.lr
        settings["fused"] = fused
        return MuonAdamW(matrices, others, settings, stage, device)
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


def keep_fused(optimizer: torch.optim.Optimizer, fused: bool | None) -> None:
    """After the state of a checkpoint was loaded: compute as this run does, on its device."""
    for group in optimizer.param_groups:
        if "fused" in group:
            group["fused"] = fused
    for parameter, state in optimizer.state.items():
        if fused and isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].to(parameter.device, torch.float32)


def set_rate(param_groups: list[dict[str, Any]], lr: float) -> None:
    """Set the learning rate of every group; `lr` is that of train.lr after warm-up and decay."""
    for group in param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)
