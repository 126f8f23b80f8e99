"""The options that decide which tokens a text becomes; corpus.json records them.

This module imports no compiled code, because the process that reads the input doesn't need any.
"""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass, field
from typing import Any

from clue_ds.data.text.choices import OnError, Words
from clue_ds.errors import UserError

# Why a sentence is dropped; the index of a reason is its code. corpus.json counts lines_REASON for
# each, and documents_REASON for those from FOREIGN on, which drop whole documents.
REASONS = ("kept", "too_short", "too_long", "repeated", "foreign", "duplicate", "near_duplicate")
KEPT, TOO_SHORT, TOO_LONG, REPEATED, FOREIGN, DUPLICATE, NEAR_DUPLICATE = range(len(REASONS))

# The 128 hashes of dedup.py can't be divided into bands for a higher similarity.
MAX_SIMILARITY = 0.98


@dataclass(frozen=True)
class Cleaning:
    """The cleaning rules. With the defaults nothing is dropped and the tokens are BERT's.

    Args:
        controls: remove NUL, byte order marks, control characters and zero-width characters
        html: replace HTML entities in the text (&nbsp; &amp; &#8220;) by their characters
        min_chars: drop lines with fewer characters than this, not counting spaces (0: off)
        max_chars: drop lines with more characters than this, not counting spaces (0: off)
        min_han: drop documents in which the share of Han characters is smaller than this (0: off)
        repeated_lines: drop lines that occurred before in the same document
        duplicates: drop documents that occurred before
        near_duplicates: drop documents at least about this similar to an earlier one (0: off; 0.8
            is usual)
    """

    controls: bool = True
    html: bool = False
    min_chars: int = 0
    max_chars: int = 0
    min_han: float = 0.0
    repeated_lines: bool = False
    duplicates: bool = False
    near_duplicates: float = 0.0

    def check(self) -> None:
        """Raise a UserError that names the flag if a value makes no sense."""
        if self.min_chars < 0 or self.max_chars < 0:
            raise UserError("--clean.min-chars and --clean.max-chars must be 0 (off) or more")
        if 0 < self.max_chars < self.min_chars:
            raise UserError("--clean.max-chars is below --clean.min-chars: no line would be left")
        if not 0 <= self.min_han <= 1:
            raise UserError("--clean.min-han must be from 0 to 1")
        if not 0 <= self.near_duplicates <= MAX_SIMILARITY:
            raise UserError(
                f"--clean.near-duplicates must be from 0 to {MAX_SIMILARITY}; use "
                "--clean.duplicates for documents that are equal"
            )
        if self.near_duplicates and importlib.util.find_spec("datasketch") is None:
            raise UserError(
                "--clean.near-duplicates needs datasketch; install it with "
                "`pip install 'clue_ds[dedup]'`"
            )

    @property
    def compares_documents(self) -> bool:
        """Whether a rule drops documents because of other documents."""
        return self.duplicates or self.near_duplicates > 0

    @property
    def reads_lines(self) -> bool:
        """Whether a rule needs `line_facts`."""
        limits = self.min_chars or self.max_chars or self.min_han
        return bool(limits or self.repeated_lines or self.duplicates)


@dataclass(frozen=True)
class ConvertOptions:
    """All options that decide which tokens a text becomes."""

    lower_case: bool = True
    words: Words = "rjieba"
    t2s: bool = False
    text_field: str = "text"
    on_error: OnError = "refuse"
    held_out: float = 0.0
    clean: Cleaning = field(default_factory=Cleaning)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def reads_lines(self) -> bool:
        """Whether anything needs `clean.line_facts`."""
        compares = self.clean.reads_lines or self.clean.compares_documents
        return compares or self.held_out > 0
