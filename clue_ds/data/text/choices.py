"""What a user chooses about text, as the values of flags. Nothing here imports compiled code."""

from __future__ import annotations

from typing import Literal

FileFormat = Literal["text", "jsonl", "parquet"]
# How an input file is read; "auto" goes by the ending of its name.
InputFormat = Literal["auto", FileFormat]
# What happens to bytes or records that can't be read.
OnError = Literal["refuse", "skip"]
# What finds words in text without spaces: rjieba, or nothing.
WordFinder = Literal["rjieba", "none"]
# What marks words: a finder, or the spaces of text that is segmented already.
Words = Literal[WordFinder, "segmented"]
