"""The tokens that no text contains, and their places in a learned vocabulary."""

from __future__ import annotations

import re

from clue_ds.vocab_file import SPECIAL_TOKENS

NUM_UNUSED = 99
# The first lines of every vocabulary that `clue-ds vocab learn` writes, as in Google's Chinese
# vocabulary: [PAD] has id 0, and [UNK], [CLS], [SEP] and [MASK] have ids 100 to 103.
LEADING_TOKENS = (
    "[PAD]",
    *(f"[unused{i}]" for i in range(1, NUM_UNUSED + 1)),
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
)
# Placeholders in the vocabularies of Google and CLUE.
_PLACEHOLDER = re.compile(r"\[unused\d+\]|<S>|<T>")


def is_special(token: str) -> bool:
    """Whether `token` is a special token or a placeholder, so that no text contains it."""
    return token in SPECIAL_TOKENS or _PLACEHOLDER.fullmatch(token) is not None
