"""What decides which tokens a text becomes, as it is recorded in corpus.json.

Nothing here imports compiled code: the process that reads the input needs the options only.
"""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass, field
from typing import Any

from clue_ds.data.text.choices import OnError, Words
from clue_ds.errors import UserError

# Why a sentence is dropped; the place in this tuple is its code. Corpus.json counts lines_REASON
# for each, and documents_REASON for those from FOREIGN on, which drop whole documents.
REASONS = ("kept", "too_short", "too_long", "repeated", "foreign", "duplicate", "near_duplicate")
KEPT, TOO_SHORT, TOO_LONG, REPEATED, FOREIGN, DUPLICATE, NEAR_DUPLICATE = range(len(REASONS))

# With the 128 hashes of dedup.py no bands tell more similar documents apart.
MAX_SIMILARITY = 0.98


@dataclass(frozen=True)
class Cleaning:
    """The rules. By default nothing is dropped, and no token is other than it was.

    Args:
        controls: take out NUL, byte order marks, control and zero-width characters
        html: replace left-over HTML entities (&nbsp; &amp; &#8220;) by what they stand for
        min_chars: drop lines of fewer characters (0: off); spaces don't count
        max_chars: drop lines of more characters (0: off)
        min_han: drop documents of which a smaller share of the characters is Han (0: off)
        repeated_lines: drop lines that occurred before in the same document
        duplicates: drop documents that occurred before
        near_duplicates: drop documents at least so similar to an earlier one (0: off; 0.8 is usual)
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
        """Raise a UserError that names the flag of a value that means nothing."""
        if self.min_chars < 0 or self.max_chars < 0:
            raise UserError("--clean.min-chars and --clean.max-chars count characters; 0 is off")
        if 0 < self.max_chars < self.min_chars:
            raise UserError("--clean.max-chars is below --clean.min-chars: no line would be left")
        if not (0 <= self.min_han <= 1 and 0 <= self.near_duplicates <= 1):
            raise UserError("--clean.min-han and --clean.near-duplicates are shares from 0 to 1")
        if self.near_duplicates > MAX_SIMILARITY:
            raise UserError(
                f"--clean.near-duplicates goes up to {MAX_SIMILARITY}; for documents that are the "
                "same there is --clean.duplicates"
            )
        if self.near_duplicates and importlib.util.find_spec("datasketch") is None:
            raise UserError(
                "--clean.near-duplicates needs datasketch; install it with "
                "`pip install 'clue_ds[dedup]'`"
            )

    @property
    def compares_documents(self) -> bool:
        """Whether a document's fate depends on other documents."""
        return self.duplicates or self.near_duplicates > 0

    @property
    def reads_lines(self) -> bool:
        """Whether a rule needs `line_facts`."""
        limits = self.min_chars or self.max_chars or self.min_han
        return bool(limits or self.repeated_lines or self.duplicates)


@dataclass(frozen=True)
class ConvertOptions:
    """What decides which tokens a text becomes; recorded in corpus.json."""

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
