"""Check a file of answers that has a JSON object {"id": ..., "label": ...} on every line.

CLUE scores line by line and reads only the labels. The id is the line's number from 0, as in CLUE's
samples, even if the test file has its own ids (CSL, CLUEWSC2020); predictions may have either.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from clue_ds.errors import UserError
from clue_ds.tasks import lines

SHOWN = 10  # ids in one message; more are only counted


def check(
    content: bytes,
    own_ids: Sequence[int | str],
    where: str,
    is_scored: bool,
    wrong_label: Callable[[int, Any], str | None],
) -> tuple[list[Any], list[str]]:
    """(labels, mistakes) of a file of answers.

    `own_ids` are those of the test file. `is_scored`: the leaderboard reads these bytes, so they
    must have one answer on every line and no byte order mark. Otherwise the answers are written
    anew, and both are harmless. `wrong_label` says what is wrong with the label of the answer with
    that number from 0.
    """
    mistakes: list[str] = []
    labels: list[Any] = []
    ids: list[tuple[int, Any]] = []  # with the numbers of their lines
    if content.startswith(lines.BYTE_ORDER_MARK):
        content = content.removeprefix(lines.BYTE_ORDER_MARK)
        if is_scored:
            mistakes.append(
                f"{where}:1: begins with a byte order mark, which CLUE's scorer would take for a "
                "part of the first answer; save it as UTF-8 without BOM"
            )
    for number, data in enumerate(content.removesuffix(b"\n").split(b"\n"), start=1):
        try:
            line = lines.decode(data, where, number)
            if not line.strip():
                if is_scored:
                    mistakes.append(
                        f"{where}:{number}: a blank line; CLUE scores line by line, so remove it"
                    )
                continue
            record = lines.json_object(line, where, number)
        except UserError as error:
            mistakes.append(str(error))
            continue
        if "id" not in record or "label" not in record:
            mistakes.append(f'{where}:{number}: not {{"id": ..., "label": ...}}')
            continue
        ids.append((number, record["id"]))
        labels.append(record["label"])
        wrong = wrong_label(len(labels) - 1, record["label"])
        mistakes += [f"{where}:{number}: {wrong}"] if wrong else []
    mistakes += _wrong_ids(ids, list(own_ids), where)
    return labels, mistakes


def _wrong_ids(ids: list[tuple[int, Any]], own: list[Any], where: str) -> list[str]:
    """Mistakes in the ids, which must be the test file's own ids or its line numbers."""
    numbers = list(range(len(own)))
    given = [json.dumps(i) for _, i in ids]  # 1, "1" and true are three ids
    if given in ([json.dumps(i) for i in own], [json.dumps(i) for i in numbers]):
        return []
    mistakes = []
    if len(ids) != len(own):
        mistakes.append(f"{where}: {len(ids):,} answers, but the test set has {len(own):,} lines")
    # Compare with whichever of the two the ids resemble more.
    plain = [str(i) for _, i in ids]
    expected = min((own, numbers), key=lambda either: len({*map(str, either)} ^ {*plain}))
    missing = sorted({*map(str, expected)} - {*plain}, key=lambda i: (len(i), i))
    unknown = sorted({*plain} - {*map(str, expected)}, key=lambda i: (len(i), i))
    twice = [i for i, count in Counter(plain).items() if count > 1]
    for what, which in (("missing", missing), ("unknown", unknown), ("twice", twice)):
        if which:
            more = f" and {len(which) - SHOWN:,} more" if len(which) > SHOWN else ""
            shown = ", ".join(one[:40] for one in which[:SHOWN])
            mistakes.append(f"{where}: ids {what}: {shown}{more}")
    if not mistakes:
        line, one, right = next(
            (line, one, right)
            for (line, one), right in zip(ids, expected, strict=True)
            if json.dumps(one) != json.dumps(right)
        )
        advice = "answers must be in the order of the test set"
        if str(one) == str(right):
            kind = "a number, without quotes" if isinstance(right, int) else "a string"
            advice = f"the id must be {kind}"
        mistakes.append(f"{where}:{line}: id {one!r} instead of {right!r}; {advice}")
    return mistakes
