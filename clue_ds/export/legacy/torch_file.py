"""pytorch_model.bin in the format of torch before 1.6, with equal bytes for equal weights.

    four pickles                 magic number, version, sizes of C types, the state dict
    a pickle                     the list of the storages' keys
    for each storage, in order   int64 number of elements, then the elements, little-endian

Guarantees: every reader of torch.save's files reads it, from torch 1.0 on and with
`weights_only=True`; a tensor that is a view takes only its own bytes; two names of one tensor share
one storage.

Rejected: torch.save with `_use_new_zipfile_serialization=False` (it names storages by their address
in memory, so no two files are equal, and it writes the whole buffer that a view looks into).
"""

from __future__ import annotations

import pickle
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clue_ds.model.weights import StateDict

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
VERSION = 1001
SYSTEM = {
    "protocol_version": VERSION,
    "little_endian": True,
    "type_sizes": {"short": 2, "int": 4, "long": 4},
}
PROTOCOL = 2
STORAGES = {torch.float32: torch.FloatStorage, torch.float16: torch.HalfStorage}


class _Storage(NamedTuple):
    key: str
    tensor: Tensor


class _Reference(NamedTuple):
    """A tensor in the pickle: all of a storage, in this shape."""

    storage: _Storage


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        kind = STORAGES[obj.tensor.dtype]
        return ("storage", kind, obj.key, "cpu", obj.tensor.numel(), None)

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, _Reference):
            return NotImplemented
        tensor = obj.storage.tensor
        shape, strides = tuple(tensor.shape), tensor.stride()
        arguments: tuple[Any, ...] = (obj.storage, 0, shape, strides, False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments


def save(state: StateDict, path: Path) -> None:
    """Write contiguous fp32 or fp16 tensors on the CPU; equal tensors under two names share one."""
    storages: dict[tuple[int, torch.Size], _Storage] = {}
    references: dict[str, _Reference] = {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.shape)
        if place not in storages:
            storages[place] = _Storage(f"{len(storages):06d}", tensor.detach().contiguous())
        references[name] = _Reference(storages[place])
    with open(path, "wb") as file:
        for value in (MAGIC_NUMBER, VERSION, SYSTEM):
            pickle.dump(value, file, PROTOCOL)
        _Pickler(file, PROTOCOL).dump(references)
        pickle.dump([storage.key for storage in storages.values()], file, PROTOCOL)
        for storage in storages.values():
            file.write(struct.pack("<q", storage.tensor.numel()))
            file.write(storage.tensor.numpy().data)
