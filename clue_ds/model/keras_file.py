"""tf_model.h5, the weights that transformers' TensorFlow classes saved, read into today's names.

Guarantees: only arrays of numbers are read, by h5py, without TensorFlow. Other .h5 files (those of
bert4keras and keras-bert) name their weights in other ways and are not looked for.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clue_ds.errors import UserError, first_line

FILE = "tf_model.h5"
# What the last part of a variable's name is called in PyTorch.
PARTS = {"kernel": "weight", "embeddings": "weight", "gamma": "weight", "beta": "bias"}


def read(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of the file, under the names of transformers' PyTorch classes."""
    try:
        import h5py
    except ImportError:
        raise UserError(f"{path} needs h5py; run: pip install 'clue_ds[keras]'") from None
    state: dict[str, torch.Tensor] = {}
    try:
        with h5py.File(path, "r") as file:
            for layer in file.attrs["layer_names"]:
                group = file[layer]
                for name in map(_text, group.attrs["weight_names"]):
                    ours, is_kernel = _name(name)
                    values = np.asarray(group[name], dtype=np.float32)
                    turned = values.T if is_kernel and values.ndim == 2 else values
                    state[ours] = torch.from_numpy(np.ascontiguousarray(turned))
    # h5py raises whatever the damage that it meets leads to.
    except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(
            f"{path} can't be read as the weights of a Keras model ({first_line(error)}); copy or "
            "download it again"
        ) from None
    return state


def _text(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)


def _name(name: str) -> tuple[str, bool]:
    """The name in PyTorch of a Keras variable, and whether it is a kernel, which is transposed.

    `tf_bert_for_pre_training/mlm___cls/predictions/transform/dense/kernel:0`: the first part is the
    model, `a___b` is called b, and `layer_._0` is layer 0.
    """
    plain = re.sub(r"/[^/]*___([^/]*)/", r"/\1/", name.removesuffix(":0")).replace("_._", "/")
    _, *parts = [part for part in plain.split("/") if part]
    last = parts[-1] if parts else plain
    return ".".join([*parts[:-1], PARTS.get(last, last)]), last == "kernel"
