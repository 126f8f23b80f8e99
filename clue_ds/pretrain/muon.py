"""Muon for weight matrices and AdamW for everything else, as one optimizer, at every ZeRO stage.

Muon replaces the momentum of a matrix by the nearest orthogonal matrix (five Newton-Schulz steps in
bf16) and scales it so that its elements are as large as those of an AdamW update
(`match_rms_adamw`). Guarantees: an update is that of torch.optim.Muon and torch.optim.AdamW on
whole parameters. ZeRO stages 1 to 3 hand the optimizer a flat shard of all matrices instead: each
rank keeps the momentum of its shard, the ranks exchange the momentum in bf16, which is what
Newton-Schulz starts from, and each rank orthogonalizes the matrices of which it owns a part. That
the shard is laid out as expected is checked at the first step.

Rejected: DeepSpeed 0.19.8's own Muon. At stages 2 and 3 it orthogonalizes before it clips, so
gradient_clipping would cut the update and not the gradient, and the logged gradient norm would be
that of the update. It also scales by sqrt(max(1, rows / columns)), unlike match_rms_adamw.
torch.optim.Muon accepts whole matrices only; tests/test_engine.py compares with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clue_ds import dist
from clue_ds.checkpoint import layout
from clue_ds.checkpoint.layout import Living, Sizes
from clue_ds.errors import UserError

MOMENTUM = 0.95
# The quintic polynomial of K. Jordan's Muon (2024), which pulls singular values towards 1.
COEFFICIENTS, NUM_ITERATIONS, EPS = (3.4445, -4.7750, 2.0315), 5, 1e-7
# Elements of the matrices that are orthogonalized at once, which bounds the memory for it.
MOST_AT_ONCE = 1 << 26


class Piece(NamedTuple):
    """What this rank has of a matrix: `target`, 1-D, is elements `low` to `high` of the `whole`."""

    whole: Tensor
    shape: tuple[int, int]
    low: int
    high: int
    target: Tensor


def orthogonalized(matrices: Tensor) -> Tensor:
    """[B, M, N] in bf16: the singular vectors of each of `matrices`, and singular values near 1."""
    a, b, c = COEFFICIENTS
    tall = matrices.size(1) > matrices.size(2)
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=EPS)
    multiply_add: Callable[..., Tensor] = torch.baddbmm
    if len(x) == 1:
        # The product of two matrices, unlike that of two batches, copies no transposed operand.
        x, multiply_add = x[0], torch.addmm
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        polynomial = multiply_add(gram, gram, gram, beta=b, alpha=c)
        x = multiply_add(x, polynomial, x, beta=a)
    return (x.mT if tall else x).view(matrices.shape)


def stacks(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """The pieces of matrices of one shape, as many as are orthogonalized at once.

    On a GPU many at once, because a matrix takes 20 launches and little computation; on a CPU one
    matrix at a time is faster.
    """
    by_shape: dict[tuple[int, int], list[Piece]] = {}
    for piece in pieces:
        by_shape.setdefault(piece.shape, []).append(piece)
    for (rows, columns), members in by_shape.items():
        on_cpu = members[0].whole.device.type == "cpu"
        most = 1 if on_cpu else max(1, MOST_AT_ONCE // (rows * columns))
        for first in range(0, len(members), most):
            yield members[first : first + most]


class MuonAdamW(torch.optim.Optimizer):
    """Muon on the group `matrices`, torch's AdamW on `others`.

    `settings`: of AdamW, its learning rate included. A parameter of the first group is a matrix at
    ZeRO stage 0, and later one flat shard of all matrices. `device` is where ranks exchange
    tensors; `dtype` is that to which DeepSpeed rounds the weights.
    """

    def __init__(
        self,
        matrices: dict[str, Any],
        others: list[dict[str, Any]],
        settings: dict[str, Any],
        stage: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._adamw = torch.optim.AdamW(others, **settings)
        self._stage, self._device = stage, device
        weights = [p.detach().to(dtype).double() for p in matrices["params"]]
        # Shapes go into the group, because DeepSpeed replaces the parameters by a flat one.
        matrices["shapes"] = [list(w.shape) for w in weights]
        self._sums = [(float(w.sum()), float(w.norm())) for w in weights]
        defaults = {"lr": settings["lr"], "weight_decay": 0.0}
        super().__init__([matrices, *self._adamw.param_groups], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient, and overwrite the gradients of matrices.

        At stages 1 to 3 every rank must call it.
        """
        assert closure is None
        for group in self.param_groups:
            if "shapes" in group:
                self._step_muon([p for p in group["params"] if p.grad is not None], group)
        # DeepSpeed replaces param_groups and state, so AdamW gets the present ones at every step.
        self._adamw.param_groups = [g for g in self.param_groups if "shapes" not in g]
        self._adamw.state = self.state
        self._adamw.step()

    def _step_muon(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Update the matrices, or the shard that this rank has of all of them."""
        if not parameters:
            return
        momenta = [self._momentum(parameter, group["shapes"]) for parameter in parameters]
        gradients = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        # Nesterov's update, in place of the gradient: another tensor of that size is not needed.
        torch._foreach_lerp_(gradients, momenta, MOMENTUM)
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        for stack in stacks(self._pieces(parameters, gradients, group["shapes"])):
            shape = stack[0].shape
            rate = group["lr"] * 0.2 * math.sqrt(max(shape))
            found = orthogonalized(torch.stack([piece.whole.view(shape) for piece in stack]))
            for piece, matrix in zip(stack, found, strict=True):
                own = matrix.reshape(-1)[piece.low : piece.high]
                piece.target.add_(own.to(piece.target.device), alpha=-rate)

    def _momentum(self, parameter: Tensor, shapes: list[list[int]]) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            if self._stage:
                self._check_layout(parameter, shapes)
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum: Tensor = state["momentum_buffer"]
        return momentum

    def _pieces(
        self, parameters: list[Tensor], updates: list[Tensor], shapes: list[list[int]]
    ) -> list[Piece]:
        """What this rank has of each matrix, with the whole of its update."""
        if not self._stage:
            return [
                Piece(update, (p.size(0), p.size(1)), 0, p.numel(), p.view(-1))
                for p, update in zip(parameters, updates, strict=True)
            ]
        found = []
        for parameter, update in zip(parameters, updates, strict=True):
            shards = self._gather(update.bfloat16())
            for (rows, columns), whole, (low, high), at in self._matrices(shards, shapes):
                if low < high:
                    target = parameter[at : at + high - low]
                    found.append(Piece(whole, (rows, columns), low, high, target))
        return found

    def _gather(self, shard: Tensor) -> Tensor:
        """Every rank's shard [W, N], on the device that computes."""
        shard = shard.to(self._device)
        shards = shard.new_empty(dist.world_size(), shard.numel())
        if dist.world_size() == 1:
            return shards.copy_(shard)
        # As bytes: not every backend sends bf16.
        torch.distributed.all_gather_into_tensor(
            shards.view(torch.uint8).view(-1), shard.view(torch.uint8)
        )
        return shards

    def _matrices(
        self, shards: Tensor, shapes: list[list[int]]
    ) -> Iterator[tuple[list[int], Tensor, tuple[int, int], int]]:
        """Of each matrix: shape, all elements, which of them this rank owns, and where they begin.

        Stages 1 and 2 cut one flat vector of all matrices into a shard per rank. Stage 3 cuts every
        matrix by itself, and a shard is the sequence of these pieces.
        """
        size, begin = shards.size(1), 0
        for shape in shapes:
            numel = shape[0] * shape[1]
            if self._stage == 3:
                width = -(-numel // dist.world_size())
                whole = shards[:, begin : begin + width].reshape(-1)[:numel]
                low = min(numel, dist.rank() * width)
                yield shape, whole, (low, min(numel, low + width)), begin
                begin += width
            else:
                offset = dist.rank() * size
                low, high = max(0, offset - begin), min(numel, offset + size - begin)
                whole = shards.view(-1)[begin : begin + numel]
                yield shape, whole, (low, high), begin + low - offset
                begin += numel

    def _check_layout(self, shard: Tensor, shapes: list[list[int]]) -> None:
        """UserError if the matrices that the model had at the start are not where they should be.

        DeepSpeed documents no layout, and settings of its JSON change it.
        """
        shards = self._gather(shard.float())
        expected = sum(a * b for a, b in shapes)
        intact = shards.numel() >= expected and all(
            abs(float(whole.double().sum()) - total) <= 0.01 * norm
            for (_, whole, _, _), (total, norm) in zip(
                self._matrices(shards, shapes), self._sums, strict=True
            )
            if whole.numel()
        )
        if not intact:
            raise _unknown_layout(self._stage)


def check_layout(living: Living, sizes: Sizes, stage: int) -> None:
    """UserError unless the matrices lie in the first tensor as MuonAdamW expects it at that stage.

    `sizes`: the number of elements of each matrix.
    """
    rank, world_size = dist.rank(), dist.world_size()
    if stage == 3:
        expected = layout.cut_pieces(sizes, rank, world_size)
    else:
        no_padding = [0] * len(sizes)
        expected = layout.flat_pieces(sizes, no_padding, rank, living.tensors[0].numel())
    if living.layout[0] != expected:
        raise _unknown_layout(stage)


def _unknown_layout(stage: int) -> UserError:
    return UserError(
        f"train.optimizer muon can't find its weight matrices in DeepSpeed's ZeRO stage "
        f"{stage} shards; remove round_robin_gradients, parameter_alignment and "
        "sub_group_size from zero_optimization in the DeepSpeed JSON, or set deepspeed "
        "zero0, or train.optimizer adamw"
    )
