"""Print docs/config.md, made from the descriptions of the config's fields.

`python docs/render_config.py > docs/config.md` updates the page, and
`python docs/render_config.py zh-CN > docs/config.zh-CN.md` the Chinese one, whose words are in
docs/config.zh-CN.yaml. Tests fail when a committed page differs from the output
(tests/test_docs.py), and when a key has no Chinese description (tests/test_chinese_pages.py).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from clue_ds.config import RunConfig
from clue_ds.settings import yaml_file

CHINESE = Path(__file__).with_name("config.zh-CN.yaml")
HEADER = """\
# The config of a run

One YAML file describes one run. Every key can also be given on the command line, which wins:
`clue-ds pretrain --config run.yaml --train.lr 2e-4`. An unknown key, a wrong type or a number out
of range is an error that names the key. The values used by a run are saved as `RUN/config.yaml`.

A key may occur once: a second one is refused, in the file with both lines, and on the command line.
`~` and `$NAME` in paths (`run_dir`, `deepspeed`, `model.init`, `data.corpus` and the other paths of
`data`) are replaced, and a variable that is not set is an error. The file is UTF-8, with or without
a byte order mark, of at most 1 MiB and 20,000 values, which may be nested 20 deep. `&name`, `*name`
and `<<` work within these limits.

Numbers that follow from others are not keys. The number of gradient accumulation steps is
`global_batch_size / (micro_batch_size * ranks)`, the number of predictions per sequence is
`ceil(mask_prob * seq_length)` unless you set it, and the vocabulary size is that of the corpus.

The DeepSpeed JSON holds only DeepSpeed's own keys (ZeRO stage, offload, bucket sizes). Every number
that this config owns is `"auto"` there and filled in at the start. If your own JSON gives a
different value, the run ends with a list of all disagreements.

This page is generated from `clue_ds/config.py` by `python docs/render_config.py`.
"""
TABLE_HEAD = "| key | type | default | meaning |\n|---|---|---|---|\n"


@dataclass(frozen=True)
class Words:
    """What a language says around and in the tables."""

    header: str = HEADER
    table_head: str = TABLE_HEAD
    required: str = "required"
    alternatives: str = " or "
    list_of: str = "list of {}"
    titles: dict[str, str] | None = None  # of each section; its name without one
    sections: dict[str, str] | None = None  # what each section is; its docstring without one
    keys: dict[str, str] | None = None  # what each key means; its description without one

    def meaning(self, key: str, field: FieldInfo) -> str:
        return self.keys[key] if self.keys else (field.description or "")


def chinese() -> Words:
    return Words(**yaml_file.read(CHINESE))


def _type(annotation: object, words: Words) -> str:
    """How an annotation is shown: `int or null`, `adamw, lamb`, `list of str`, `str -> float`."""
    if get_origin(annotation) is Literal:
        return ", ".join(map(str, get_args(annotation)))
    if get_origin(annotation) is Annotated:
        return _type(get_args(annotation)[0], words)
    parts = [_type(part, words) for part in get_args(annotation)]
    if get_origin(annotation) is dict:
        return " -> ".join(parts)
    if get_origin(annotation) is list:
        return words.list_of.format(parts[0])
    if parts:
        return words.alternatives.join(parts)
    return "null" if annotation is type(None) else annotation.__name__  # type: ignore[attr-defined]


def sections() -> Iterator[tuple[str, type[BaseModel], dict[str, FieldInfo]]]:
    """Name, class and keys of each section of the config, without the keys that are sections."""
    found: list[tuple[str, type[BaseModel]]] = [("", RunConfig)]
    for prefix, section in found:
        fields = {}
        for name, field in section.model_fields.items():
            for each in get_args(field.annotation):
                if isinstance(each, type) and issubclass(each, BaseModel):  # a list of sections
                    found.append((f"{prefix}{name}.N.", each))
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                found.append((f"{prefix}{name}.", field.annotation))
            else:
                fields[f"{prefix}{name}"] = field
        yield prefix.rstrip("."), section, fields


def render(words: Words) -> str:
    parts = [words.header]
    for name, section, fields in sections():
        title = (words.titles or {}).get(name, name or "top level")
        about = words.sections[name] if words.sections else section.__doc__
        parts.append(f"\n## {title}\n\n{about}\n\n{words.table_head}")
        for key, field in fields.items():
            value = "" if field.is_required() else json.dumps(field.default).replace('"', "")
            default = words.required if field.is_required() else f"`{value}`"
            meaning = words.meaning(key, field).replace("|", ", ")
            shown = _type(field.annotation, words)
            parts.append(f"| `{key}` | {shown} | {default} | {meaning} |\n")
    return "".join(parts)


if __name__ == "__main__":
    sys.stdout.write(render(chinese() if sys.argv[1:] == ["zh-CN"] else Words()))
