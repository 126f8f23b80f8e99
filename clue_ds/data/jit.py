"""`compiled` and `inlined`: how the numba functions of clue_ds.data are compiled.

Machine code is cached on disk (the first start takes some seconds, later ones some milliseconds),
the GIL is released while it runs, and it starts no threads of its own. Numba writes cache files
under a temporary name and renames them, so processes that start together are safe, and it uses the
user's cache directory when the package's own is read-only. Where no directory can be written (a
container without a home), functions are compiled again at each start, with the same result.

A cached function is invalidated by the date and size of its own source file only, and what it takes
from another file is compiled into it. Compiled functions therefore call only compiled functions of
the same file, `counter_rng.mix`, `counter_rng.derive` and `pointers.mapped`, and these three never
change. A file that changes the fields of a table or a constant which compiled functions of other
files read (as stream/tables.py and sampling.py do) must be changed together with those files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
from numba.core.caching import FunctionCache

F = TypeVar("F", bound=Callable[..., Any])


def _has_cache_directory(function: Callable[..., Any]) -> bool:
    try:
        FunctionCache(function)
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
        return False
    return True


def compiled(function: F) -> F:
    """`numba.njit(nogil=True)`, cached on disk where a directory for it can be written."""
    dispatcher: Any = numba.njit(nogil=True, cache=_has_cache_directory(function))(function)
    return dispatcher


def inlined(function: F) -> F:
    """Like `compiled`, for helpers that are only called from compiled functions."""
    dispatcher: Any = numba.njit(nogil=True)(function)
    return dispatcher
