"""Check a file of answers that is one JSON object, from names of blanks or questions to answers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from clue_ds.tasks import lines
from clue_ds.tasks.kinds.answer_lines import SHOWN


def write(answers: dict[str, Any]) -> str:
    """The content of the file."""
    return json.dumps(answers, ensure_ascii=False) + "\n"


def is_lines(content: bytes) -> bool:
    """Whether it is not one object but a line for each example, as `clue-ds predict` writes."""
    first = content.removeprefix(lines.BYTE_ORDER_MARK).lstrip().split(b"\n", 1)[0]
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and "id" in value


def read(content: bytes, where: str) -> tuple[dict[str, Any], list[str]]:
    """(answers, mistakes in the form) of a file."""
    twice: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(name for name, _ in pairs)
        twice.extend(name for name, count in counts.items() if count > 1)
        return dict(pairs)

    if content.startswith(lines.BYTE_ORDER_MARK):
        return {}, [f"{where}: begins with a byte order mark; save it as UTF-8 without BOM"]
    try:
        found = json.loads(content.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        return {}, [f"{where}: not one JSON object: {reason}"]
    if not isinstance(found, dict):
        return {}, [f"{where}: must be one JSON object from names to answers"]
    mistakes = [f"{where}: answered twice: {_some(twice)}"] if twice else []
    return found, mistakes


def wrong_names(found: dict[str, Any], expected: Sequence[str], where: str) -> list[str]:
    """Mistakes in the names, which must be those of the test set."""
    known = set(expected)
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in known]
    return [
        f"{where}: {len(names):,} {what}: {_some(names)}"
        for what, names in (("missing", missing), ("unknown", unknown))
        if names
    ]


def wrong_index(given: Any, count: int) -> str | None:
    """What is wrong with an index of one of `count` candidates."""
    if isinstance(given, int) and not isinstance(given, bool) and 0 <= given < count:
        return None
    shown = json.dumps(given, ensure_ascii=False)[:40]
    return f"{shown} must be the index of one of the {count} candidates, from 0, without quotes"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(name[:40] for name in names[:SHOWN]) + more
