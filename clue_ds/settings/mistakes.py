"""What pydantic found wrong with settings, as one message of a few lines."""

from __future__ import annotations

import difflib
import re
from typing import get_args

from pydantic import BaseModel, ValidationError

from clue_ds.errors import shorten

MAX_MISTAKES = 20  # in one message


def _known_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Field names of the section that contains the key at `location`."""
    for name in location[:-1]:
        if isinstance(name, int):  # an entry of a list of sections
            continue
        if name not in model.model_fields:
            return []
        annotation = model.model_fields[name].annotation
        candidates = [c for c in (annotation, *get_args(annotation)) if isinstance(c, type)]
        sections = [c for c in candidates if issubclass(c, BaseModel)]
        if not sections:
            return []
        model = sections[0]
    return list(model.model_fields)


def explain(error: ValidationError, model: type[BaseModel], where: str | None = None) -> str:
    """The mistakes in one message, each with its key; a misspelled key gets a suggestion."""
    errors = error.errors()
    lines = []
    for item in errors[:MAX_MISTAKES]:
        key = _shown(item["loc"])
        if item["type"] == "extra_forbidden":
            known = _known_keys(model, item["loc"])
            near = difflib.get_close_matches(str(item["loc"][-1])[:100], known, n=1)
            meant = _shown((*item["loc"][:-1], near[0])) if near else None
            hint = f"did you mean {meant}?" if meant else f"known keys: {', '.join(known)}"
            lines.append(f"unknown key {key}; {hint}")
        elif item["type"] == "missing":
            lines.append(f"missing key {key}")
        else:
            given = "" if item["type"] == "value_error" else f" (got {shorten(item['input'])})"
            message = item["msg"].removeprefix("Value error, ")
            lines.append(f"{key}: {message}{given}" if key else message)
    if len(errors) > MAX_MISTAKES:
        lines.append(f"and {len(errors) - MAX_MISTAKES} more mistakes")
    return (f"{where}: " if where else "") + "; ".join(lines)


def _shown(location: tuple[int | str, ...]) -> str:
    """A key with dots; a part that is no plain word is in quotes."""
    parts = (str(part) for part in location)
    return ".".join(part if re.fullmatch(r"[\w-]+", part) else shorten(part) for part in parts)
