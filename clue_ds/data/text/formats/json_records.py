"""JSON records: one line of JSON lines, and an array of records read as JSON lines.

`parse_line` is the only reader of a line of JSON: whatever a line holds, the result is a value or a
`BadLine`. A byte order mark, a carriage return and spaces at the end are no part of the record.

An array is read front to back and turned into lines of the same length, so a record keeps its
offset, memory is bounded, and workers parse the records in parallel. Rejected: json.load, which
holds the whole file and several times its size in objects.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clue_ds.data.text.formats.kinds import BOM, HEAD_BYTES, REFUSED, recognise, text_format
from clue_ds.data.text.formats.streams import Readable
from clue_ds.errors import UserError


class BadLine(Exception):
    """A line is no JSON; `byte` is where it isn't UTF-8, None where it is."""

    def __init__(self, reason: str, byte: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.byte = byte


def is_blank(line: bytes) -> bool:
    """Whether a line has no record: white space, perhaps after a byte order mark."""
    return not line.removeprefix(BOM).strip()


def parse_line(line: bytes) -> Any:
    """The JSON value of one line."""
    try:
        # With "surrogatepass", as json.loads decodes bytes: only texts that are used must be UTF-8.
        return json.loads(line.decode("utf-8", "surrogatepass").lstrip("\ufeff"))
    except UnicodeDecodeError as error:
        raise BadLine(error.reason, error.start) from None
    except json.JSONDecodeError as error:
        raise BadLine(error.msg) from None
    except RecursionError:
        raise BadLine("it is nested too deeply") from None
    except ValueError as error:  # an integer of thousands of digits
        raise BadLine(str(error).partition(";")[0]) from None


def read_records(path: str | Path) -> Iterator[tuple[int, Any]]:
    """(number of its line, record) of a small file of JSON lines; blank lines are passed over.

    UserError with file and line for a line that is no JSON.
    """
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
        kind = recognise(head)
        format, refused = text_format(head, len(head) < HEAD_BYTES, "jsonl", is_given=False)
        if kind is not None or format is None:
            kind = kind or refused
            said = REFUSED.get(kind, f"is a {kind} file; unpack it")
            raise UserError(f"{path} {said}. What is read here is JSON lines, one record per line")
        if format == "array":
            raise UserError(
                f"{path} is a JSON array; put each record on a line of its own, for example with: "
                "jq -c '.[]' FILE"
            )
        file.seek(0)
        for number, line in enumerate(file, 1):
            if is_blank(line):
                continue
            try:
                record = parse_line(line)
            except BadLine as error:
                found = "JSON" if error.byte is None else f"UTF-8 at its byte {error.byte}"
                raise UserError(
                    f"{path}, line {number} is not {found}: {error.reason}; correct it, or leave "
                    "it out"
                ) from None
            yield number, record


_STRUCTURE = re.compile(rb'["\[\]{},\n]')
_IN_STRING = re.compile(rb'["\\\n]')
_NOT_SPACE = re.compile(rb"[^ \t\r\n]")


class ArrayLines:
    """Reads a JSON array, or several in a row, as lines of one record each.

    The commas between records become line feeds, and line feeds inside of records carriage returns,
    which are white space outside of strings and, like line feeds, no JSON inside of them.
    """

    def __init__(self, raw: Readable, name: str) -> None:
        self._raw, self._name = raw, name
        self._depth = 0
        self._offset = 0  # of the block at hand
        self._in_string = self._escaped = False

    def read(self, num_bytes: int) -> bytes:
        block = bytearray(self._raw.read(num_bytes))
        if not block and self._depth:
            raise UserError(
                f"input {self._name} ends after byte {self._offset} inside of its JSON array; "
                "download or copy it again"
            )
        if not self._offset and block.startswith(BOM):
            block[: len(BOM)] = b" " * len(BOM)
        at = 0
        while 0 <= at < len(block):
            if not self._depth:
                at = self._begin(block, at)
            elif self._in_string:
                at = self._string(block, at)
            else:
                at = self._structure(block, at)
        self._offset += len(block)
        return bytes(block)

    def _begin(self, block: bytearray, at: int) -> int:
        """Go on to what follows the bracket that opens an array; -1 at the end of the block."""
        match = _NOT_SPACE.search(block, at)
        if match is None:
            return -1
        if match[0] != b"[":
            raise UserError(
                f"input {self._name}: byte {self._offset + match.start()} is neither inside of the "
                "JSON array nor the beginning of another; correct the file"
            )
        block[match.start()] = ord(" ")
        self._depth = 1
        return match.end()

    def _string(self, block: bytearray, at: int) -> int:
        if self._escaped:
            self._escaped = False
            if block[at] == ord("\n"):
                block[at] = ord("\r")
            return at + 1
        match = _IN_STRING.search(block, at)
        if match is None:
            return -1
        if match[0] == b'"':
            self._in_string = False
        elif match[0] == b"\\":
            self._escaped = True
        else:
            block[match.start()] = ord("\r")
        return match.end()

    def _structure(self, block: bytearray, at: int) -> int:
        match = _STRUCTURE.search(block, at)
        if match is None:
            return -1
        byte = match[0]
        if byte == b'"':
            self._in_string = True
        elif byte in b"[{":
            self._depth += 1
        elif byte in b"]}":
            self._depth -= 1
            if not self._depth:
                block[match.start()] = ord("\n")
        elif byte == b"\n":
            block[match.start()] = ord("\r")
        elif self._depth == 1:
            block[match.start()] = ord("\n")
        return match.end()
