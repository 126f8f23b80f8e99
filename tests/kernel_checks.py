"""How kernels are compared with torch: shapes, the error rule, guard bands round every buffer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# 1, 2, 7: below the narrowest tile; 8: exactly it; 312, 1000: divisible by 8, not by 16; 769: no
# two rows aligned alike; 1536: 25% of a tile is padding; 2048, 4096: several warps a row.
WIDTHS = (1, 2, 7, 8, 64, 312, 384, 512, 640, 768, 769, 1000, 1024, 1536, 2048, 4096)
# 0 launches nothing; 127 to 129: around a tile's last row.
ROWS = (0, 1, 3, 127, 128, 129)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# What may be added to 1.25 x torch's own error, in units of the last place of the largest value. In
# fp32 torch's error is itself a few units and varies with the order of a sum (4); fp16 has one
# rounding more or less, which tells on rows of few elements (1); bf16 stores of the interpreter cut
# bits off where a GPU rounds (1; see `kept` for what is stored twice).
EXTRA_ULPS = {torch.float32: 4.0, torch.float16: 1.0, torch.bfloat16: 1.0}
# fp32 noise of sums of order 1, where the exact gradient cancels to 0 (LayerNorm of width 1 or 2).
FLOOR = 2.0**-22

GUARD = 64  # elements; a multiple of 16 bytes, so that views stay as aligned as fresh tensors


def assert_accurate(
    ours: Tensor,
    low: Tensor,
    exact: Tensor,
    what: str,
    dtype: torch.dtype | None = None,
    num_stores: int = 1,
) -> None:
    """Error of `ours` against fp64 `exact` <= 1.25 x that of torch's `low` precision, + ulps.

    `dtype`: of the activations, whose rounding an fp32 parameter's gradient inherits. `num_stores`:
    how many roundings in bf16 a value has behind it.
    """
    dtype = dtype or ours.dtype
    assert ours.shape == exact.shape and ours.dtype == low.dtype, what
    if not ours.numel():
        return
    exact = exact.double()
    error, allowed = ((t.double() - exact).abs().max().item() for t in (ours, low))
    ulp = torch.finfo(dtype).eps * exact.abs().max().item()
    extra = EXTRA_ULPS[dtype] * (num_stores if dtype == torch.bfloat16 else 1)
    bound = 1.25 * allowed + extra * ulp + FLOOR
    assert error <= bound, f"{what}: error {error:.3g} > {bound:.3g} (torch's: {allowed:.3g})"


def compare(
    fused: Callable[..., Tensor],
    twin: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    options: dict[str, Any],
    what: str,
    kept: int = 0,
) -> None:
    """Result and every gradient of `fused` against `twin` in the same dtypes and in fp64.

    `kept`: roundings in what backward reads of forward's results; softmax's is its probabilities.
    """
    torch.manual_seed(7)

    def run(function: Callable[..., Tensor], exact: bool) -> list[Tensor | None]:
        leaves = [
            None if t is None else (t.double() if exact else t).detach().requires_grad_()
            for t in inputs
        ]
        out = function(*leaves, **options)
        # Every second element of a wider buffer: gradients need not be contiguous.
        grad = torch.randn((*out.shape[:-1], 2 * out.shape[-1]), dtype=torch.float32)[..., ::2]
        grad = grad.to(inputs[0].dtype).to(out)  # type: ignore[union-attr]
        wanted = [leaf for leaf in leaves if leaf is not None]
        return [out.detach(), *torch.autograd.grad(out, wanted, grad)]

    torch.manual_seed(7)
    ours = run(fused, exact=False)
    torch.manual_seed(7)
    low = run(twin, exact=False)
    torch.manual_seed(7)
    exact = run(twin, exact=True)
    for i, (mine, theirs, truth) in enumerate(zip(ours, low, exact, strict=True)):
        which = "result" if i == 0 else f"gradient {i}"
        num_stores = 1 + kept if i else 1
        assert_accurate(mine, theirs, truth, f"{what}, {which}", ours[0].dtype, num_stores)


def guarded(x: Tensor) -> Tensor:
    """x with NaN before and after it: what reads too far shows."""
    filler = True if x.dtype == torch.bool else float("nan") if x.is_floating_point() else -(2**30)
    buffer = torch.full((x.numel() + 2 * GUARD,), filler, dtype=x.dtype, device=x.device)
    inner = buffer[GUARD : GUARD + x.numel()].view(x.shape)
    return inner.copy_(x.detach())


@contextmanager
def guard_bands(monkeypatch: Any) -> Iterator[None]:
    """While it lasts, torch.empty(_like) surrounds with NaN; at the end none may be overwritten."""
    real, buffers = torch.empty, []

    def empty(*shape: Any, **options: Any) -> Tensor:
        plain = real(*shape, **options)
        if not plain.is_floating_point():
            return plain
        buffer = torch.full(
            (plain.numel() + 2 * GUARD,), float("nan"), dtype=plain.dtype, device=plain.device
        )
        buffers.append(buffer)
        return buffer[GUARD : GUARD + plain.numel()].view(plain.shape)

    def empty_like(x: Tensor, **options: Any) -> Tensor:
        return empty(x.shape, dtype=x.dtype, device=x.device)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        patch.setattr(torch, "empty_like", empty_like)
        yield
    assert buffers, "nothing was allocated"
    for buffer in buffers:
        assert buffer[:GUARD].isnan().all() and buffer[-GUARD:].isnan().all(), "wrote outside"
