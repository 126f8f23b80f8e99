"""Dropout masks of the kernels: their rate, independent draws, no repeats, no effect of tiles."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from clue_ds import kernels
from clue_ds.kernels import reference


def mask_of(rows: int, width: int, p: float, seed: int, device: torch.device) -> Tensor:
    """bool [rows, width], drawn by the kernel."""
    x = torch.zeros(rows, width, device=device)
    weight = torch.ones(width, device=device)
    _, mask = kernels.bias_dropout_add_layer_norm(
        x, None, None, weight, weight, p, 1e-12, True, seed=seed, return_mask=True
    )
    return mask


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate(p: float, kernel_device: torch.device) -> None:
    dropped = (~mask_of(500, 1000, p, 1, kernel_device)).double()
    num_dropped, _ = reference.dropout_threshold(p)
    sigma = math.sqrt(p * (1 - p))
    assert abs(dropped.mean().item() - num_dropped / 65_536) < 5 * sigma / math.sqrt(500_000)
    for draw in range(8):  # each of the eight draws of a counter is fair
        share = dropped[:, draw::8].mean().item()
        assert abs(share - p) < 5 * sigma / math.sqrt(500_000 / 8)


def test_no_two_rows_are_alike_and_neighbours_are_independent(kernel_device: torch.device) -> None:
    """The mask of xformers repeated every 32 rows."""
    mask = mask_of(1024, 64, 0.5, 2, kernel_device)
    assert torch.unique(mask, dim=0).shape[0] == 1024
    fair = mask.double() * 2 - 1
    for shift in (1, 2, 8, 16, 32, 64, 128):
        by_row = (fair[shift:] * fair[:-shift]).mean().item()
        assert abs(by_row) < 5 / math.sqrt(64 * (1024 - shift)), shift
        if shift < 64:
            by_column = (fair[:, shift:] * fair[:, :-shift]).mean().item()
            assert abs(by_column) < 5 / math.sqrt((64 - shift) * 1024), shift


def test_seeds_are_independent(kernel_device: torch.device) -> None:
    masks = [
        mask_of(64, 512, 0.5, seed, kernel_device).double() * 2 - 1
        for seed in (0, 1, 2**32, 2**32 + 1, 2**62)
    ]
    for i, first in enumerate(masks):
        for second in masks[:i]:
            assert abs((first * second).mean().item()) < 5 / math.sqrt(64 * 512)


def test_mask_depends_on_seed_row_and_column_only(kernel_device: torch.device) -> None:
    whole = mask_of(37, 312, 0.3, 3, kernel_device)
    for rows, width in ((1, 312), (5, 312), (37, 8), (37, 17), (37, 1)):
        assert torch.equal(mask_of(rows, width, 0.3, 3, kernel_device), whole[:rows, :width])


def test_reference_draws_philox_as_published() -> None:
    """The authors' test vector of Philox-4x32-7 for counter 0 and key 0."""
    keep_all = reference.philox_keep(torch.Size((1, 8)), 0, 0)
    assert bool(keep_all.all())
    draws = []
    for column in range(8):  # find each draw by bisection: it is kept up to a threshold of itself
        low, high = 0, 65_536
        while high - low > 1:
            middle = (low + high) // 2
            kept = bool(reference.philox_keep(torch.Size((1, 8)), middle, 0)[0, column])
            low, high = (middle, high) if kept else (low, middle)
        draws.append(low)
    words = [draws[2 * i] | draws[2 * i + 1] << 16 for i in range(4)]
    assert words == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


def test_rows_beyond_32_bits_have_their_own_masks() -> None:
    """The counter holds both halves of the row number, so masks don't repeat after 2^32 rows."""
    seed = torch.tensor(5)
    few = reference.philox_keep(torch.Size((4, 64)), 32_768, seed)
    assert few.shape == (4, 64) and not torch.equal(few[0], few[1])
