"""Opening the files of a checkpoint so that none of them can run code.

Guarantees: inside `guarded`, every torch.load of this process, DeepSpeed's own included, uses
torch's restricted unpickler with the classes of ALLOWED and no others, whatever the caller asked
for; a file that asks for anything else is one error that names the file. A hash that fits is no
reason to trust a pickle: whoever writes a checkpoint also writes its manifest.

Rejected: a checkpoint engine of our own for DeepSpeed, because zero_to_fp32 and the universal
format call torch.load directly; scanning a file before DeepSpeed opens it, because the file could
change in between.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from clue_ds.checkpoint.deepspeed_import import import_deepspeed
from clue_ds.errors import UserError, first_line

# (module, name) of every class that DeepSpeed's shards contain beside tensors and containers, at
# every ZeRO stage and precision. Creating one of them only sets its attributes.
ALLOWED = (
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
)
# How torch's unpickler names what it refused.
_FORBIDDEN = re.compile(r"(?:GLOBAL|global|function|class) ([A-Za-z_][\w.]*\.[\w.]+)")


def load(path: Path, mmap: bool = False) -> Any:
    """The content of a pickle of DeepSpeed's, on the CPU; UserError when it holds anything else.

    `mmap`: tensors are read from the file when they are used. torch maps only its zip files, which
    DeepSpeed writes; any other file is read whole, so that a refusal says what is in it.
    """
    with guarded():
        maps = mmap and zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", mmap=maps)


def load_plain(path: Path) -> Any:
    """The content of a pickle of tensors and plain values, on the CPU; UserError for all else."""
    return _restricted(torch.load)(path, map_location="cpu")


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The content of a safetensors file; UserError when it is none."""
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(_refusal(path, error)) from error


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Restrict every torch.load in this block; UserError for a file that it can't open."""
    import_deepspeed()
    allowed = [getattr(importlib.import_module(module), name) for module, name in ALLOWED]
    original = torch.load
    torch.load = _restricted(original)
    try:
        with torch.serialization.safe_globals(allowed):
            yield
    finally:
        torch.load = original


def _restricted(original: Any) -> Any:
    """torch.load that opens only what is allowed, whatever the caller asks for."""

    def restricted(f: Any, map_location: Any = None, *_: Any, **options: Any) -> Any:
        mmap = options.get("mmap")
        try:
            return original(f, map_location=map_location, mmap=mmap, weights_only=True)
        # Hostile bytes can raise anything in an unpickler.
        except Exception as error:
            raise UserError(_refusal(f, error)) from error

    return restricted


def _refusal(file: Any, error: Exception) -> str:
    name = file if isinstance(file, str | os.PathLike) else getattr(file, "name", "a stream")
    found = _FORBIDDEN.search(str(error))
    if found is not None:
        reason = (
            f"was not opened, because it asks for {found[1]}, which no checkpoint of clue_ds "
            "contains and which could run code as this user"
        )
    else:
        reason = f"can't be opened as what a run saves there: {first_line(error)[:200]}"
    return f"{name} {reason}. Nothing in it was run; restore the checkpoint from a copy you trust"
