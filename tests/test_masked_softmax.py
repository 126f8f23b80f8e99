"""The masked_softmax kernel: lengths, masks, rows without keys, NaN, dropout."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import LONG_DTYPES, WIDTHS, compare, guard_bands, guarded
from torch import Tensor

from clue_ds import kernels
from clue_ds.kernels import reference
from clue_ds.kernels.verify.operations import eager_masked_softmax

SEED = 77


@pytest.mark.parametrize("dtype", LONG_DTYPES, ids=str)
def test_all_lengths_with_and_without_dropout(
    dtype: torch.dtype, kernel_device: torch.device
) -> None:
    for i, num_keys in enumerate((*WIDTHS, 3, 5, 17, 127, 4095)):
        options = {
            "key_lengths": torch.tensor([num_keys, (num_keys + 1) // 2], device=kernel_device),
            "scale": 0.5,
            "dropout_p": (0.0, 0.1)[i % 2],
            "seed": SEED,
        }

        def make(num_keys: int = num_keys) -> list[Tensor]:
            return [3 * torch.randn(2, 2, 16, num_keys, device=kernel_device).to(dtype)]

        compare(
            kernels.masked_softmax, reference.masked_softmax, make, options, f"{num_keys} keys",
            own=eager_masked_softmax,
        )  # fmt: skip


MASK_SHAPES = [(2, 3, 4, 9), (2, 1, 1, 9), (1, 1, 4, 9), (2, 1, 4, 1), (9,), (4, 9)]


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_masks_broadcast_through_their_strides(
    shape: tuple[int, ...], kernel_device: torch.device
) -> None:
    def make() -> list[Tensor]:
        return [torch.randn(2, 3, 4, 9, device=kernel_device)]

    torch.manual_seed(0)
    boolean = torch.rand(shape, device=kernel_device) < 0.3
    additive = torch.randn(shape, device=kernel_device)
    for mask in (boolean, additive, torch.where(boolean, float("-inf"), additive)):
        for lengths in (None, torch.tensor([9, 4], device=kernel_device)):
            options = {"mask": mask, "key_lengths": lengths}
            compare(kernels.masked_softmax, reference.masked_softmax, make, options, str(options))


def test_true_means_masked(kernel_device: torch.device) -> None:
    scores = torch.zeros(1, 1, 1, 4, device=kernel_device)
    mask = torch.tensor([True, False, False, True], device=kernel_device)
    out = kernels.masked_softmax(scores, mask)
    assert out.flatten().tolist() == [0.0, 0.5, 0.5, 0.0]


def _every_way_to_mask_all(device: torch.device) -> list[dict[str, Tensor]]:
    return [
        {"mask": torch.ones(1, 1, 1, 5, dtype=torch.bool, device=device)},
        {"mask": torch.full((1, 1, 1, 5), float("-inf"), device=device)},
        {"key_lengths": torch.zeros(1, dtype=torch.int64, device=device)},
        {
            "mask": torch.tensor([True, True, False, False, False], device=device),
            "key_lengths": torch.tensor([2], device=device),
        },
    ]


def test_row_without_keys_is_zero_with_zero_gradients(kernel_device: torch.device) -> None:
    for options in _every_way_to_mask_all(kernel_device):
        for operation in (kernels.masked_softmax, reference.masked_softmax):
            scores = torch.randn(1, 2, 3, 5, device=kernel_device, requires_grad=True)
            out = operation(scores, **options)
            (grad,) = torch.autograd.grad(out, scores, torch.randn_like(out))
            assert torch.count_nonzero(out) == 0 and torch.count_nonzero(grad) == 0
            assert not out.isnan().any() and not grad.isnan().any()


def test_maximum_is_taken_after_masking(kernel_device: torch.device) -> None:
    """DeepSpeed took it before masking: a huge masked score made the others underflow to 0 / 0."""
    scores = torch.tensor([[[[1e4, 0.0, 0.0]]]], device=kernel_device)
    mask = torch.tensor([True, False, False], device=kernel_device)
    assert kernels.masked_softmax(scores, mask).flatten().tolist() == [0.0, 0.5, 0.5]


def test_nan_shows_unless_it_is_masked(kernel_device: torch.device) -> None:
    scores = torch.zeros(1, 1, 2, 8, device=kernel_device)
    scores[0, 0, 0, 3] = float("nan")
    out = kernels.masked_softmax(scores)
    assert out[0, 0, 0].isnan().all() and out[0, 0, 1].isfinite().all()
    assert kernels.masked_softmax(torch.full_like(scores, float("nan"))).isnan().all()
    hidden = kernels.masked_softmax(scores, key_lengths=torch.tensor([3], device=kernel_device))
    assert hidden.isfinite().all()


def test_dropout_equals_the_references(kernel_device: torch.device) -> None:
    torch.manual_seed(0)
    scores = torch.randn(2, 4, 33, 130, device=kernel_device, requires_grad=True)
    for p in (0.1, 0.5, 1.0):
        options = {"dropout_p": p, "seed": SEED}
        ours = kernels.masked_softmax(scores, **options)
        theirs = reference.masked_softmax(scores, **options)
        assert torch.equal(ours == 0, theirs == 0)
        torch.testing.assert_close(ours, theirs)
        (grad,) = torch.autograd.grad(ours, scores, torch.ones_like(ours) + ours.detach())
        (other,) = torch.autograd.grad(theirs, scores, torch.ones_like(ours) + ours.detach())
        torch.testing.assert_close(grad, other)
    assert torch.equal(
        kernels.masked_softmax(scores, dropout_p=0.5, training=False),
        kernels.masked_softmax(scores),
    )


def test_fewer_dimensions_and_scattered_scores(kernel_device: torch.device) -> None:
    torch.manual_seed(0)
    flat = torch.randn(6, 11, device=kernel_device)
    torch.testing.assert_close(kernels.masked_softmax(flat), flat.softmax(-1))
    scattered = torch.randn(2, 5, 3, 11, device=kernel_device).transpose(1, 2)
    torch.testing.assert_close(kernels.masked_softmax(scattered), scattered.softmax(-1))
    assert kernels.masked_softmax(torch.empty(0, 2, 3, 4, device=kernel_device)).numel() == 0


def test_touches_nothing_outside_its_buffers(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    for shape in ((1, 1, 1, 1), (2, 1, 3, 7), (1, 3, 43, 129)):
        scores = guarded(torch.randn(shape, device=kernel_device)).requires_grad_()
        mask = guarded(torch.rand(shape, device=kernel_device) < 0.2)
        lengths = guarded(torch.full(shape[:1], shape[-1], device=kernel_device))
        with guard_bands(monkeypatch):
            out = kernels.masked_softmax(scores, mask, lengths, dropout_p=0.1, seed=SEED)
            (grad,) = torch.autograd.grad(out, scores, guarded(torch.randn_like(out)))
        assert out.isfinite().all() and grad.isfinite().all()
