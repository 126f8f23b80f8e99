"""Environment variables that hold numbers, as launchers set them."""

from __future__ import annotations

import os
import re

from clue_ds.errors import UserError, shorten


def number(name: str) -> int | None:
    """The variable's value; None where it is missing or empty; a UserError if it is no number."""
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    # int alone accepts signs, underscores and digits of other scripts.
    if not re.fullmatch("[0-9]{1,9}", text):
        raise UserError(f"the variable {name}={shorten(text)} is not a number; unset it")
    return int(text)
