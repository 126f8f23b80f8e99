"""The values that flags about text can have. This module imports no compiled code."""

from __future__ import annotations

from typing import Literal

FileFormat = Literal["text", "jsonl", "csv", "parquet"]
# How an input file is read; "auto" decides by its content, and between texts by its name.
InputFormat = Literal["auto", FileFormat]
# What happens to bytes or records that can't be read: an error, or they are dropped and counted.
OnError = Literal["refuse", "skip"]
# How words are found in text that has no spaces between them: by rjieba, or not at all.
WordFinder = Literal["rjieba", "none"]
# How words are marked; "segmented" takes the spaces of text that is already segmented.
Words = Literal[WordFinder, "segmented"]
