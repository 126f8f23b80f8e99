"""`compiled`: how every numba function of this package is compiled.

Machine code is cached on disk (first start some seconds, later ones some milliseconds), the GIL is
released while it runs, and nothing here uses threads of its own. Numba writes cache files to a
temporary name and renames them, so processes that start together are safe, and it moves to the
user's cache directory when the package directory is read-only. Where no directory at all can be
written (a container without a home), functions are compiled anew at each start, same result.

Numba invalidates a cached function by the date of its own source file only. Compiled functions
therefore call compiled functions of the same file, or of `counter_rng`, which is fixed for ever.
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
