"""CLUE's directory with small files of each task, in CLUE's own formats."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from clue_ds.tasks import registry

COUNTS = {"train": 12, "dev": 6, "test": 4}
TEXT = "今天股市大涨，周末去哪儿玩？叶老桂说花呗怎么还款，战国无双是谁开发的。"
CHID_FIRST = {"train": 0, "dev": 100, "test": registry.CHID_FIRST_OF_TEST_11}


def write_clue(directory: Path) -> Path:
    """Tasks of `--task all`, DRCD, MSRA-NER; each label of a small set occurs in each split."""
    draws = random.Random(0)
    for name in (*registry.ALL, "drcd", "msraner"):
        folder = directory / registry.get(name).folder
        folder.mkdir(parents=True)
        for split, count in COUNTS.items():
            rows = [_record(name, number, draws) for number in range(count)]
            if name in ("cmrc2018", "drcd"):
                paragraphs = [_paragraph(f"{split}_{number}", draws) for number in range(count)]
                _write(folder / f"{split}.json", {"data": [{"paragraphs": paragraphs}]})
            elif name == "c3":
                _write_c3(folder, split, count, draws)
            elif name == "chid":
                _write_chid(folder, split, count)
            else:
                hidden = (registry.get(name).label_field,) if split == "test" else ()
                shown = [{k: v for k, v in row.items() if k not in hidden} for row in rows]
                _write(folder / f"{split}.json", *shown)
    return directory


def _write(path: Path, *rows: object) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _words(draws: random.Random, length: int = 12) -> str:
    return "".join(draws.choices(TEXT, k=length))


def _record(name: str, number: int, draws: random.Random) -> dict[str, Any]:
    """A line of a task that has one example a line."""
    task = registry.get(name)
    if name in ("cluener", "msraner"):
        text, kind = f"叶老桂在{_words(draws)}", "name" if name == "cluener" else "NR"
        return {"id": number, "text": text, "label": {kind: {"叶老桂": [[0, 2]]}}}
    label = task.labels[number % len(task.labels)] if task.labels else None
    row: dict[str, Any] = {"id": number, "label": label}
    if name == "csl":
        return {**row, "keyword": [_words(draws, 2), _words(draws, 2)], "abst": _words(draws)}
    if name == "cluewsc2020":
        text = f"叶老桂说他{_words(draws)}"
        target = {"span1_text": "叶老桂", "span1_index": 0, "span2_text": "他", "span2_index": 4}
        return {**row, "text": text, "target": target}
    return row | {field: _words(draws) for field in task.fields}


def _paragraph(name: str, draws: random.Random) -> dict[str, Any]:
    begin = draws.randrange(8)
    context = f"{_words(draws, begin)}光荣{_words(draws, 10)}"
    answers = [{"text": "光荣", "answer_start": begin}]
    return {"context": context, "qas": [{"id": name, "question": "谁开发的？", "answers": answers}]}


def _write_c3(folder: Path, split: str, count: int, draws: random.Random) -> None:
    stems = ("test1.1",) if split == "test" else (f"m-{split}", f"d-{split}")
    for stem in stems:
        passages = []
        for number in range(count):
            question: dict[str, Any] = {"question": "谁？", "choice": ["好", "坏", "大"]}
            question |= {"id": number} if split == "test" else {"answer": "好"}
            passages.append([[_words(draws)], [question], str(number)])
        _write(folder / f"{stem}.json", passages)


def _write_chid(folder: Path, split: str, count: int) -> None:
    first = CHID_FIRST[split]
    names = [f"#idiom{number:06}#" for number in range(first, first + count)]
    rows = [{"candidates": ["大涨", "周末"], "content": [f"今天{name}还款"]} for name in names]
    stem = "test1.1" if split == "test" else split
    _write(folder / f"{stem}.json", *rows)
    if split != "test":
        _write(folder / f"{split}_answer.json", dict.fromkeys(names, 1))
