"""MuonAdamW on ZeRO's shards equals torch.optim.Muon on whole matrices, bit for bit.

Gradients are given, so that nothing but the optimizer computes; test_engine.py trains with it under
DeepSpeed at every stage, where sums in another order allow no equality of bits.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn

from clue_ds.errors import UserError
from clue_ds.pretrain import muon
from clue_ds.pretrain.muon import MuonAdamW

CPU = torch.device("cpu")
# Wide, tall, square, and one with an odd number of elements, which leaves padding in the shards.
SHAPES = [(6, 10), (12, 5), (8, 8), (7, 9)]
NUM_STEPS, LR, DECAY = 4, 0.03, 0.1
ADAMW = {"lr": LR, "betas": (0.9, 0.98), "eps": 1e-6}


def drawn(seed: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw) for shape in SHAPES]


def by_torch() -> list[Tensor]:
    parameters = [nn.Parameter(m) for m in drawn(0)]
    stepper = torch.optim.Muon(
        parameters, lr=LR, weight_decay=DECAY, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(NUM_STEPS):
        for parameter, gradient in zip(parameters, drawn(step + 1), strict=True):
            parameter.grad = gradient
        stepper.step()
    return [p.detach() for p in parameters]


def cut(matrices: list[Tensor], stage: int, rank: int, world_size: int) -> Tensor:
    """A rank's shard: of one flat vector at stages 1 and 2, of every matrix at stage 3."""

    def shard(vector: Tensor) -> Tensor:
        size = -(-vector.numel() // world_size)
        padded = nn.functional.pad(vector, (0, size * world_size - vector.numel()))
        return padded[rank * size : (rank + 1) * size]

    if stage == 3:
        return torch.cat([shard(m.reshape(-1)) for m in matrices])
    return shard(torch.cat([m.reshape(-1) for m in matrices]))


def make_optimizer(stage: int) -> MuonAdamW:
    matrices = {"params": [nn.Parameter(m) for m in drawn(0)], "weight_decay": DECAY}
    other = {"params": [nn.Parameter(torch.ones(3))], "weight_decay": 0.0}
    optimizer = MuonAdamW(matrices, [other], dict(ADAMW), stage, CPU)
    optimizer.param_groups[0]["lr"] = LR
    return optimizer


def ranks_step() -> dict[str, bool]:
    """On every rank: whether each stage's shard ends as that of torch.optim.Muon, and a stage 2
    whose matrices are in another order is refused."""
    from clue_ds import dist
    from clue_ds.pretrain.engine import start

    start()
    rank, world_size, expected = dist.rank(), dist.world_size(), by_torch()
    equal = {}
    for stage in (1, 2, 3):
        optimizer = make_optimizer(stage)
        shard = nn.Parameter(cut(drawn(0), stage, rank, world_size))
        # As DeepSpeed does it: a flat shard takes the place of the parameters.
        optimizer.param_groups[0]["params"] = [shard]
        for step in range(NUM_STEPS):
            shard.grad = cut(drawn(step + 1), stage, rank, world_size)
            optimizer.step()
        equal[str(stage)] = torch.equal(shard.detach(), cut(expected, stage, rank, world_size))
    optimizer = make_optimizer(2)
    shard = nn.Parameter(cut(drawn(0)[::-1], 2, rank, world_size))
    shard.grad = torch.zeros_like(shard)
    optimizer.param_groups[0]["params"] = [shard]
    try:
        optimizer.step()
    except UserError as error:
        equal["refused"] = "round_robin_gradients" in str(error)
    return equal


def test_whole_matrices_end_as_those_of_torch() -> None:
    optimizer = make_optimizer(0)
    parameters = optimizer.param_groups[0]["params"]
    for step in range(NUM_STEPS):
        for parameter, gradient in zip(parameters, drawn(step + 1), strict=True):
            parameter.grad = gradient
        optimizer.step()
    for parameter, expected in zip(parameters, by_torch(), strict=True):
        assert torch.equal(parameter, expected)


def test_other_parameters_end_as_those_of_torch_adamw() -> None:
    optimizer = make_optimizer(0)
    ours = optimizer.param_groups[1]["params"][0]
    theirs = nn.Parameter(torch.ones(3))
    settings: dict[str, Any] = dict(ADAMW)
    adamw = torch.optim.AdamW([theirs], weight_decay=0.0, **settings)
    for step in range(NUM_STEPS):
        ours.grad = theirs.grad = torch.tensor([1.0, -2.0, 0.1 * step])
        optimizer.step()
        adamw.step()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_shards_end_as_those_of_torch_and_another_layout_is_refused(world_size: int) -> None:
    expected = {"1": True, "2": True, "3": True, "refused": True}
    assert run_ranks(world_size, ranks_step) == [expected] * world_size


def test_matrices_of_one_shape_are_orthogonalized_at_once_where_that_is_faster() -> None:
    """On a GPU in stacks of limited size; the meta device stands for it."""
    counts = {(1024, 4096): 40, (7, 9): 3}
    assert muon.MOST_AT_ONCE // (1024 * 4096) == 16
    for device, expected in (("cpu", [1] * 43), ("meta", [16, 16, 8, 3])):
        whole = torch.empty(0, device=device)
        pieces = [
            muon.Piece(whole, shape, 0, 1, whole) for shape, n in counts.items() for _ in range(n)
        ]
        assert [len(stack) for stack in muon.stacks(pieces)] == expected
    for shape in SHAPES:
        matrices = torch.stack([torch.randn(shape) for _ in range(3)])
        alone = torch.cat([muon.orthogonalized(matrix[None]) for matrix in matrices])
        torch.testing.assert_close(muon.orthogonalized(matrices), alone, atol=2e-2, rtol=0.0)
