"""Importing DeepSpeed 0.19.8 so that it starts no compiler, asks for no GPU and prints nothing.

Guarantees: every module that needs DeepSpeed gets it from here, so it is imported once, late, and
with the same settings whoever is first: the engine, or a reader of checkpoints.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Any

import torch


def import_deepspeed() -> Any:
    """deepspeed, told to be quiet, and to be content with a CPU where there is no GPU."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # torch 2.13 warns about the names of collectives that DeepSpeed calls, once a call.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    # By its name in sys.modules: `import deepspeed.comm.torch as x` gives the torch package.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    return deepspeed
