"""Importing DeepSpeed 0.19.8 so that it starts no compiler, needs no GPU and prints nothing.

Guarantees: every module that needs DeepSpeed gets it from here, so it is imported once, late, and
with the same settings, whether the engine or a reader of checkpoints is first.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Any

import torch


def import_deepspeed() -> Any:
    """The deepspeed package: it prints errors only, and uses the CPU without an accelerator."""
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # torch 2.13 warns at every call about the names of collectives that DeepSpeed uses.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    # Taken from sys.modules, because `import deepspeed.comm.torch as x` returns the torch package.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    return deepspeed
