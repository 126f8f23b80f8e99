"""`mapped`: an array at an address, for compiled code that chooses among maps of one type.

A numba list of arrays costs a reference count for each access, and a tuple of them compiles anew
for each number of shards. What this returns is part of no cache's key: never change this file.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, types
from numba.extending import intrinsic

from clue_ds.data.jit import inlined


@intrinsic
def _pointer(typing_context: Any, address: Any, like: Any) -> Any:
    """The address as a pointer to elements of the array `like`'s type."""
    pointer = types.CPointer(like.dtype)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    return pointer(address, like), generate


@inlined
def mapped(address: np.uint64, num: int, like: np.ndarray) -> np.ndarray:
    """The `num` elements of `like`'s type at the address; they must stay mapped."""
    return carray(_pointer(address, like), (num,))  # type: ignore[call-arg]
