"""A processor without bf16 instructions is warned of, and only then."""

from __future__ import annotations

from pathlib import Path

import torch

from clue_ds.job.preflight import slow_precision

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_bf16_is_slow_without_its_instructions(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name : A\nflags : fpu avx2 avx512f\n")
    (warning,) = slow_precision("bf16", CPU, cpuinfo)
    assert "no instructions for bf16" in warning and "train.precision fp32" in warning
    assert slow_precision("fp32", CPU, cpuinfo) == slow_precision("bf16", GPU, cpuinfo) == []
    cpuinfo.write_text("flags : fpu avx512f avx512_bf16\n")
    assert slow_precision("bf16", CPU, cpuinfo) == []
    assert slow_precision("bf16", CPU, tmp_path / "none") == []
