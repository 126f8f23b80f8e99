"""Putting a checkpoint's state into a running engine of any ZeRO stage and number of ranks.

Guarantees: each rank copies only what its own tensors hold; masters and moments are the saved bits,
and 16-bit weights are the masters rounded as after an update; padding is zero. An element that the
checkpoint lacks is an error before anything is trained.

Rejected: letting DeepSpeed load first and correcting it afterwards, because it refuses another
number of ranks, and takes other orders of parameters for its own without a word.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from clue_ds.checkpoint.layout import Living
from clue_ds.checkpoint.shards import LOSS_SCALE, MASTER, SavedState
from clue_ds.errors import UserError


def fill(optimizer: Any, stage: int, living: Living, saved: SavedState) -> None:
    """Set masters, moments, numbers of steps and the loss scale of DeepSpeed's optimizer.

    UserError when the checkpoint lacks something; only `refresh` needs the other ranks.
    """
    if getattr(optimizer, "swap_optimizer", False):
        raise UserError(
            "this DeepSpeed JSON keeps optimizer states on NVMe, where no other layout can be "
            "read into; continue on as many ranks as before with the JSON as it was, or set "
            "offload_optimizer.device to cpu"
        )
    states: dict[int, dict[str, Any]] = {}
    for number, tensor in enumerate(living.tensors):
        states[number] = _fill_one(tensor, number, living, saved)
    if stage == 3:
        # Outside of a step, stage 3 keeps its optimizer's groups empty.
        optimizer._set_fp32_optimizer_param_groups()
    inner = getattr(optimizer, "optimizer", optimizer)
    inner.load_state_dict(
        {
            "state": {number: state for number, state in states.items() if state},
            "param_groups": inner.state_dict()["param_groups"],
        }
    )
    if stage == 3:
        optimizer._clear_fp32_optimizer_param_groups()
    set_loss_scale(optimizer, saved)


def set_loss_scale(optimizer: Any, saved: SavedState) -> None:
    """Continue with the checkpoint's fp16 loss scale; other precisions have none."""
    scaler = getattr(optimizer, "loss_scaler", getattr(optimizer, "loss_scale_config", None))
    for key in LOSS_SCALE:
        if key in saved.loss_scale and hasattr(scaler, key):
            setattr(scaler, key, saved.loss_scale[key])


def _fill_one(tensor: Tensor, number: int, living: Living, saved: SavedState) -> dict[str, Any]:
    """Set one master tensor; returns the optimizer's state for it."""
    leader = living.leaders[number]
    keys, scalars = saved.keys(leader), saved.scalars(leader)
    moments = {key: torch.zeros_like(tensor.detach()) for key in keys}
    flat = {MASTER: tensor.detach(), **moments}
    flat[MASTER].zero_()
    for piece in living.layout[number]:
        if saved.scalars(piece.name) != scalars:
            raise UserError(
                f"{piece.name} was updated another number of times than {leader}, so they can't "
                "share a tensor; continue the run at the ZeRO stage that it had"
            )
        for key, values in flat.items():
            target = values.view(-1)[piece.at : piece.at + piece.end - piece.begin]
            saved.copy_to(target, key, piece.name, piece.begin)
    return {**scalars, **moments}


def refresh(optimizer: Any, stage: int) -> None:
    """Set the model's weights to the masters, rounded; every rank must call it."""
    with torch.no_grad():
        if stage == 3:
            for number in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(number)
        elif stage:
            optimizer.update_lp_params()
        else:  # in fp32 the masters are the weights
            pairs = zip(
                getattr(optimizer, "fp16_groups", ()),
                getattr(optimizer, "fp32_groups", ()),
                strict=True,
            )
            for weights, masters in pairs:
                for weight, master in zip(weights, masters, strict=True):
                    weight.copy_(master)


def set_frozen(module: nn.Module, frozen: dict[str, Tensor], rank: int) -> None:
    """Set the parameters that are not trained; at stage 3, this rank's part of them."""
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, value in frozen.items():
            parameter = parameters[name]
            part = getattr(parameter, "ds_tensor", None)
            if part is None:
                parameter.copy_(value)
            else:
                own = value.reshape(-1)[rank * part.numel() : (rank + 1) * part.numel()]
                part.view(-1)[: own.numel()].copy_(own)
