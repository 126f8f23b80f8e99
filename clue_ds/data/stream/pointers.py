"""`mapped`: the array at an address, for compiled code that chooses one of many mapped arrays.

Rejected: a numba list of arrays (it counts references at each access), a tuple of arrays (functions
are compiled again for each number of shards). Never change what `mapped` returns: machine code of
functions that call it is cached, and a change here does not invalidate those caches (jit.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, types
from numba.extending import intrinsic

from clue_ds.data.jit import inlined


@intrinsic
def _pointer(typing_context: Any, address: Any, like: Any) -> Any:
    """The address as a pointer to elements of the type that the array `like` has."""
    pointer = types.CPointer(like.dtype)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    return pointer(address, like), generate


@inlined
def mapped(address: np.uint64, num: int, like: np.ndarray) -> np.ndarray:
    """The `num` elements at the address, of the type that `like` has; they must stay mapped."""
    return carray(_pointer(address, like), (num,))  # type: ignore[call-arg]
