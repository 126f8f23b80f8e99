"""The checks of tests/gpu, at sizes that Triton's interpreter can compute."""

from __future__ import annotations

import pytest
import torch
from device_checks import (
    OPERATIONS,
    check_all_rows,
    check_last_masks,
    check_last_rows,
    check_last_sequence,
    losses_of,
)


@pytest.mark.parametrize("op", OPERATIONS)
def test_rows(op: str, kernel_device: torch.device) -> None:
    check_all_rows(op, 65, 24, kernel_device)
    check_last_rows(op, 65, 24, kernel_device)


def test_masks_of_the_last_rows(kernel_device: torch.device) -> None:
    check_last_masks(65, 256, kernel_device)


def test_last_of_many_sequences(kernel_device: torch.device) -> None:
    check_last_sequence(35, 2, 7, kernel_device)


def test_training_takes_the_same_steps(kernel_device: torch.device) -> None:
    sizes = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 64,
    }  # fmt: skip
    with_kernels, without = (
        losses_of(backend, 0.0, kernel_device, 2, **sizes) for backend in ("triton", "torch")
    )
    torch.testing.assert_close(with_kernels, without, rtol=1e-3, atol=1e-3)
    assert without[1] < without[0]
