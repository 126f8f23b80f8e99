"""What a user chooses about text, as the values of flags. Nothing here imports compiled code."""

from __future__ import annotations

from typing import Literal

# How an input file is read; "auto" goes by the ending of its name.
InputFormat = Literal["auto", "text", "jsonl", "parquet"]
# What happens to bytes or records that can't be read.
OnError = Literal["refuse", "skip"]
# What finds words: rjieba, the spaces of text that is segmented already, or nothing.
Words = Literal["rjieba", "segmented", "none"]
