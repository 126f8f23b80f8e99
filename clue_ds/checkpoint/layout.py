"""Where each element of a parameter lies in the tensors of DeepSpeed's optimizer on one rank.

An optimizer of DeepSpeed's holds one tensor per parameter (stage 0), per group (stages 1 and 2) or
per sub-group (stage 3). A Layout says for each of these tensors which pieces of which parameters it
holds. Masters and moments of a rank have the same layout, in memory and in its shard.

Rejected: `param_slice_mappings`, which DeepSpeed saves for its universal format: it does not know
the order of round_robin_gradients and gives the wrong parameters then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """Elements `begin` to `end` of the flattened parameter `name`, from `at` on in a tensor."""

    name: str
    begin: int
    end: int
    at: int


# For each tensor of the optimizer on one rank, the pieces in it.
Layout = list[list[Piece]]
# Number of elements of each parameter of a group, in the order in which they are laid out.
Sizes = dict[str, int]


def whole(sizes: Sizes) -> Layout:
    """Stage 0: each parameter is a tensor of its own."""
    return [[Piece(name, 0, numel, 0)] for name, numel in sizes.items()]


def flat_pieces(sizes: Sizes, paddings: list[int], rank: int, length: int) -> list[Piece]:
    """Stages 1 and 2: a group is one flat vector, and each rank has `length` elements of it.

    `paddings`: unused elements after each parameter.
    """
    low, high = rank * length, (rank + 1) * length
    pieces, start = [], 0
    for (name, numel), padding in zip(sizes.items(), paddings, strict=True):
        begin, end = max(low - start, 0), min(high - start, numel)
        if begin < end:
            pieces.append(Piece(name, begin, end, start + begin - low))
        start += numel + padding
    return pieces


def cut_pieces(sizes: Sizes, rank: int, world_size: int) -> list[Piece]:
    """Stage 3: each parameter is cut evenly by itself; a rank's parts follow one another."""
    pieces, at = [], 0
    for name, numel in sizes.items():
        width = -(-numel // world_size)
        begin, end = min(numel, rank * width), min(numel, (rank + 1) * width)
        if begin < end:
            pieces.append(Piece(name, begin, end, at))
        at += width
    return pieces


@dataclass(frozen=True)
class Living:
    """The optimizer of a running engine on one rank: its master tensors and their layout.

    `leaders`: for each tensor a parameter of its group. The tensor may hold nothing of it: with
    many ranks and a small group a tensor holds only padding.
    """

    tensors: list[Tensor]
    layout: Layout
    leaders: list[str]


def of_optimizer(
    optimizer: Any,
    stage: int,
    names: dict[int, str],
    group_names: list[list[str]],
    rank: int,
    world_size: int,
) -> Living:
    """The layout of DeepSpeed's optimizer on this rank. `names`: by id of the model's parameters.

    At stage 0 the tensors are in the order of `group_names`, and may be fp32 copies without names.
    """
    if stage == 0:
        inner = getattr(optimizer, "optimizer", optimizer)
        tensors = [p for group in inner.param_groups for p in group["params"]]
        ordered = [name for group in group_names for name in group]
        sizes = {name: t.numel() for name, t in zip(ordered, tensors, strict=True)}
        return Living(tensors, whole(sizes), ordered)
    if stage == 3:
        all_sizes = [{names[id(p)]: p.ds_numel for p in group} for group in optimizer.fp16_groups]
        tensors = optimizer.fp32_partitioned_groups_flat
        layout = [cut_pieces(sizes, rank, world_size) for sizes in all_sizes]
        return Living(tensors, layout, [next(iter(sizes)) for sizes in all_sizes])
    if hasattr(optimizer, "bf16_groups"):  # BF16_Optimizer, of stage 1 in bf16 without offload
        groups, tensors = optimizer.bf16_groups, optimizer.fp32_groups_flat_partition
        paddings = [[0] * len(group) for group in groups]
    else:
        groups, tensors = (
            optimizer.round_robin_bit16_groups,
            optimizer.single_partition_of_fp32_groups,
        )
        paddings = optimizer.round_robin_bit16_padding
    all_sizes = [{names[id(p)]: p.numel() for p in group} for group in groups]
    layout = [
        flat_pieces(sizes, padding, rank, tensor.numel())
        for sizes, padding, tensor in zip(all_sizes, paddings, tensors, strict=True)
    ]
    return Living(tensors, layout, [next(iter(sizes)) for sizes in all_sizes])
