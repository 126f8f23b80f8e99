"""Cut texts that are longer than the model reads into windows, so that every token is read.

Windows overlap by half. Each token belongs to the one window in which its smaller side of context
is largest; it is trained and answered there and nowhere else, so a token counts once however many
windows hold it.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple


class Window(NamedTuple):
    """Tokens `begin` to `end` - 1 of a text, of which `own_begin` to `own_end` - 1 belong to it."""

    begin: int
    end: int
    own_begin: int
    own_end: int


def windows(num_tokens: int, room: int) -> list[Window]:
    """The windows of at most `room` tokens, at least one."""
    if num_tokens <= room:
        return [Window(0, num_tokens, 0, num_tokens)]
    step = max(1, room // 2)
    begins = [*range(0, num_tokens - room, step), num_tokens - room]
    # The border of two windows is the middle of what they share.
    borders = [(after + before + room) // 2 for before, after in pairwise(begins)]
    owned = zip([0, *borders], [*borders, num_tokens], strict=True)
    return [Window(b, b + room, *own) for b, own in zip(begins, owned, strict=True)]
