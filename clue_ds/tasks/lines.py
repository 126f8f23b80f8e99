"""Read the lines of a text file, and the JSON object on a line: the only such reader of `tasks`.

Guarantees: only a line feed ends a line (U+2028 belongs to the text); a byte order mark at the
beginning of the file is not text; a carriage return and spaces at the end of a line don't matter;
a line without any character but spaces is blank. A UserError names file and line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from clue_ds.errors import UserError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a file with their line feeds, one at a time."""
    with path.open("rb") as stream:
        for number, data in enumerate(stream, start=1):
            yield decode(data.removeprefix(BYTE_ORDER_MARK) if number == 1 else data, path, number)


def decode(data: bytes, file: str | Path, number: int) -> str:
    """The text of line `number` of `file`."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}:{number}: not UTF-8 ({error.reason}); convert the file to UTF-8 first"
        ) from None


def json_objects(
    numbered_lines: Iterable[tuple[int, str]], file: str | Path
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, JSON object) of every line that is not blank."""
    for number, line in numbered_lines:
        if line.strip():
            yield number, json_object(line, file, number)


def json_object(line: str, file: str | Path, number: int) -> dict[str, Any]:
    """The JSON object on line `number` of `file`."""
    where = f"{file}:{number}"
    try:
        value = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        if number == 1 and line.lstrip().startswith("["):
            raise _array(where) from None
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{where}: not JSON: {reason}; a line must be a JSON object") from None
    if isinstance(value, list) and number == 1:
        raise _array(where)
    if not isinstance(value, dict):
        raise UserError(f"{where}: a line must be a JSON object, not {line.strip()[:40]!r}")
    return value


def _array(where: str) -> UserError:
    return UserError(
        f"{where}: a JSON array begins here; write one JSON object per line instead, for example "
        "with: jq -c '.[]' FILE > NEW.json"
    )


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def begins_with(path: Path, character: str) -> bool:
    """Whether the first character of a file that is no space is this one."""
    with path.open("rb") as stream:
        first = stream.read(4096).removeprefix(BYTE_ORDER_MARK).lstrip()
    return first.startswith(character.encode())


def json_file(path: Path) -> Any:
    """The JSON value that is a whole file; a UserError names file and line."""
    text = "".join(read_lines(path))
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise UserError(f"{path}:1: not JSON: nested too deeply") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: not JSON: {error.msg} at character {error.colno}; restore the "
            "file from its archive"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
