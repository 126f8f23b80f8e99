"""Reads the YAML files that users write: the config of a run, and the description of a task.

Guarantees: a mapping of plain values, or a UserError with file, line and key within a second and a
few MB of memory, whatever the file holds. A key that occurs twice is refused (YAML libraries keep
the last one). Aliases may repeat values, but not explode: a file of 300 bytes can stand for 10^9
values. `<<: *base` merges as YAML 1.1 says. A byte order mark is accepted.

The events are checked first, one by one, because libraries compose nested values by recursion.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml

from clue_ds.errors import UserError, existing_file, shorten

MAX_BYTES = 1 << 20
MAX_DEPTH = 20
MAX_VALUES = 20_000
# Longer numbers or dates are nobody's settings, and converting them takes quadratic time.
MAX_SCALAR = 200
MAX_KEY = 4_096  # the longest path

# libyaml is ten times as fast; PyYAML's wheels contain it.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
TAG = "tag:yaml.org,2002:"
MERGE, TEXT, MAPPING, SEQUENCE = (TAG + name for name in ("merge", "str", "map", "seq"))


def read(path: str | Path, what: str = "config file") -> dict[str, Any]:
    """The mapping in a YAML file; `what` is the file's name in messages."""
    path = Path(path)
    # exists() is False where the name is too long, and is_fifo() raises OSError.
    if not os.path.exists(path) or not path.is_fifo():
        path = existing_file(path, what)
    with open(path, "rb") as file:
        content = file.read(MAX_BYTES + 1)
    where = f"{what} {path}"
    if len(content) > MAX_BYTES:
        raise UserError(f"{where} is larger than {MAX_BYTES >> 20} MiB; is it the right file?")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{where}, line {line}: not UTF-8 text, so not valid YAML; save the file as UTF-8"
        ) from None
    values = _Reader(where).read(text)
    if not isinstance(values, dict):
        raise UserError(f"{where} must hold `key: value` lines, not {shorten(values)}")
    return values


class _Reader:
    """Turns text into values; `where` begins every message."""

    def __init__(self, where: str) -> None:
        self._where, self._num_values = where, 0

    def read(self, text: str) -> Any:
        try:
            self._check_depth(text)
            loader = LOADER(text)
            node = loader.get_single_node()
            self._loader = loader
            return None if node is None else self._value(node, "", 0)
        except yaml.MarkedYAMLError as error:
            said = ": ".join(filter(None, (error.context, error.problem)))
            self._refuse(error.problem_mark, f"not valid YAML: {shorten(said, quoted=False)}")
        except yaml.reader.ReaderError as error:
            raise UserError(
                f"{self._where} is not valid YAML: it contains the control character "
                f"#x{int(error.character):04x}; delete that"
            ) from None
        except yaml.YAMLError as error:
            said = shorten(str(error), quoted=False)
            raise UserError(f"{self._where} is not valid YAML: {said}") from None

    def _refuse(self, mark: yaml.Mark | None, message: str, key: str = "") -> NoReturn:
        line = "" if mark is None else f", line {mark.line + 1}"
        place = f", key {shorten(key, quoted=False)}" if key else ""
        raise UserError(f"{self._where}{line}{place}: {message}") from None

    def _check_depth(self, text: str) -> None:
        depth = 0
        for number, event in enumerate(yaml.parse(text, Loader=LOADER)):
            opens = isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent))
            depth += opens
            depth -= isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent))
            if depth > MAX_DEPTH:
                self._refuse(event.start_mark, f"nested more than {MAX_DEPTH} deep; flatten it")
            if number > 2 * MAX_VALUES:
                self._refuse(event.start_mark, f"more than {MAX_VALUES:,} values; shorten the file")

    def _value(self, node: yaml.Node, key: str, depth: int) -> Any:
        """The value of a node, each time that an alias names it."""
        self._num_values += 1
        if self._num_values > MAX_VALUES or depth > MAX_DEPTH:
            self._refuse(
                node.start_mark,
                f"with its aliases (*name) the file holds more than {MAX_VALUES:,} values or is "
                f"nested more than {MAX_DEPTH} deep; write out what you need",
                key,
            )
        if isinstance(node, yaml.MappingNode) and node.tag == MAPPING:
            return self._mapping(node, key, depth)
        if isinstance(node, yaml.SequenceNode) and node.tag == SEQUENCE:
            return [
                self._value(child, f"{key}[{n}]", depth + 1) for n, child in enumerate(node.value)
            ]
        return self._scalar(node, key)

    def _mapping(self, node: yaml.MappingNode, key: str, depth: int) -> dict[Any, Any]:
        values: dict[Any, Any] = {}
        merged: dict[Any, Any] = {}
        lines: dict[Any, int] = {}
        for name_node, child in node.value:
            if name_node.tag == MERGE:
                for base in self._bases(child, key, depth):
                    merged = {**base, **merged}
                continue
            if not isinstance(name_node, yaml.ScalarNode):
                self._refuse(name_node.start_mark, "a key must be a single word or text", key)
            if len(name_node.value) > MAX_KEY:
                self._refuse(name_node.start_mark, "a key is longer than any path", key)
            name = self._scalar(name_node, key)
            full = f"{key}.{name}" if key else str(name)
            if name in lines:
                self._refuse(
                    name_node.start_mark,
                    f"the key is given twice, first in line {lines[name]}; keep one of them",
                    full,
                )
            lines[name] = name_node.start_mark.line + 1
            values[name] = self._value(child, full, depth + 1)
        return {**merged, **values}

    def _bases(self, node: yaml.Node, key: str, depth: int) -> Iterator[dict[Any, Any]]:
        """The mappings that `<<` merges; the first one that has a key wins."""
        is_list = isinstance(node, yaml.SequenceNode)
        for child in node.value if is_list else [node]:
            base = self._value(child, key, depth + 1)
            if not isinstance(base, dict):
                self._refuse(child.start_mark, "`<<` takes a mapping or a list of mappings", key)
            yield base

    def _scalar(self, node: yaml.Node, key: str) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            self._refuse(node.start_mark, f"the tag {shorten(node.tag)} can't be used here", key)
        if node.tag != TEXT and len(node.value) > MAX_SCALAR:
            self._refuse(node.start_mark, "too long for a number or a date", key)
        try:
            return self._loader.construct_object(node, deep=True)
        except yaml.YAMLError as error:
            said = getattr(error, "problem", None) or str(error)
        except (ValueError, ArithmeticError) as error:  # a date in month 13, `!!int x`
            said = str(error)
        except (AttributeError, LookupError, TypeError):  # `!!timestamp x`, `!!bool x`
            said = "it is not of the type that its tag names"
        self._refuse(
            node.start_mark, f"can't read {shorten(node.value)}: {shorten(said, quoted=False)}", key
        )
