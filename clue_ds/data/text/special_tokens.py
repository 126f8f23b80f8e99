"""The tokens that no text contains, and their places in a learned vocabulary."""

from __future__ import annotations

import re

from clue_ds.vocab_file import SPECIAL_TOKENS

# What BERT needs; a vocab.txt without one of them is refused.
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
NUM_UNUSED = 99
# The first lines of every vocabulary that is learned here, as in Google's Chinese list: [PAD] is 0,
# and [UNK], [CLS], [SEP] and [MASK] are 100 to 103.
LEADING_TOKENS = (
    "[PAD]",
    *(f"[unused{i}]" for i in range(1, NUM_UNUSED + 1)),
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
)
# Placeholders: Google's and CLUE's lists have [unused1] and up, and <S> and <T> behind [MASK].
_PLACEHOLDER = re.compile(r"\[unused\d+\]|<S>|<T>")


def is_special(token: str) -> bool:
    """Whether a token is one that no text contains."""
    return token in SPECIAL_TOKENS or _PLACEHOLDER.fullmatch(token) is not None
