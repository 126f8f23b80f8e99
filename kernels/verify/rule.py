"""The error rule: how far a kernel may be from fp64, compared with torch's own operation.

tests/kernel_checks.py takes FACTOR and OUTLIER_ULPS from here; it adds rules for rows so few, or so
narrow, that an error is a matter of chance.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The RMS error, compared with fp64, is at most this many times that of torch's own operation in the
# same dtypes. RMS and not the maximum, because in fp32 both errors are a unit in the last place or
# less, and the worst of some thousand elements is a matter of chance and not of the arithmetic
# (maxima differ by a factor of up to 3.2 where RMS errors agree within 10%).
FACTOR = 1.25
# RMS could hide a single wrong element, so none may be off by more than FACTOR times torch's worst
# plus one unit in the last place of the largest value (4 units in fp32, for the reason above).
OUTLIER_ULPS = {torch.float32: 4.0, torch.float16: 1.0, torch.bfloat16: 1.0}
# Errors below this share of the values' RMS (and of 1) are fp32's own noise, which depends on the
# order of the sums: the gradient of a bias has too few elements to compare such errors.
FLOOR = 2.0**-22


def judge(
    ours: Tensor, low: Tensor, exact: Tensor, dtype: torch.dtype, share: float = FLOOR
) -> tuple[float, str]:
    """Our RMS error in units of torch's, and what breaks the rule; the latter is empty if nothing.

    `low`: torch's result in the same dtypes; `exact`: in fp64; `dtype`: of the activations;
    `share`: of the values' RMS, below which an error is noise.
    """
    mine, torchs = ((t.double() - exact).abs() for t in (ours, low))
    floor = share * max(1.0, exact.square().mean().sqrt().item())
    rms, other = (t.square().mean().sqrt().item() for t in (mine, torchs))
    ratio = rms / max(other, floor)
    if math.isnan(ratio):
        return math.inf, "has a NaN, where torch has none"
    if rms > FACTOR * other + floor:
        return ratio, f"has an RMS error of {rms:.3g}, where torch's is {other:.3g}"
    ulps = OUTLIER_ULPS[dtype] * torch.finfo(dtype).eps * exact.abs().max().item()
    bound = FACTOR * torchs.max().item() + ulps + floor
    if mine.max().item() > bound:
        return ratio, f"has an element that is off by {mine.max().item():.3g} > {bound:.3g}"
    return ratio, ""
