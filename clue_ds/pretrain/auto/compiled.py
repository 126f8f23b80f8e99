"""What `model.compile: auto` is: true on CUDA devices, where compiled code is faster.

On an H200 it trains `roberta_tiny_clue` 1.3 times as fast (docs/performance.md). On a CPU it gains
less than the minute of compilation costs.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import TYPE_CHECKING

from clue_ds import dist
from clue_ds.config import RunConfig
from clue_ds.pretrain import ds_json

if TYPE_CHECKING:  # `clue-ds plan --help` imports this package, and torch takes a second
    import torch

COMPILERS = ("gcc", "clang", "cc")


def with_compile(config: RunConfig, compiles: bool) -> RunConfig:
    """The config with a value in place of `auto`; one that the user set stays."""
    if config.model.compile != "auto":
        return config
    model = config.model.model_copy(update={"compile": compiles})
    return config.model_copy(update={"model": model})


def choose(config: RunConfig, device: torch.device) -> tuple[RunConfig, list[str]]:
    """The config with one value for all ranks, and notes for the user; every rank must call it."""
    if config.model.compile != "auto":
        return config, []
    why_not = _obstacle(config, device)
    obstacles = [answer for answer in dist.all_gather(why_not) if answer is not None]
    config = with_compile(config, not obstacles)
    if not obstacles:
        return config, ["model.compile auto is true: compiled code is faster on a GPU"]
    notes = [] if device.type == "cpu" else [f"model.compile auto is false: {obstacles[0]}"]
    return config, notes


def _obstacle(config: RunConfig, device: torch.device) -> str | None:
    """Why this rank does not compile."""
    if device.type != "cuda":
        return f"compiled code was not tried on {device.type}"
    if ds_json.zero_stage(ds_json.read(config.deepspeed)) > ds_json.LAST_COMPILED_STAGE:
        return "ZeRO stage 3 gathers parameters in a way that torch.compile can't follow"
    if importlib.util.find_spec("triton") is None:
        return "Triton, which compiles for GPUs, is not installed"
    if not os.environ.get("CC") and not any(shutil.which(name) for name in COMPILERS):
        return f"Triton needs a C compiler, and none of {', '.join(COMPILERS)} is on the PATH"
    return None
