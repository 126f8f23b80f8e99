"""Print docs/config.md, made from the descriptions of the config's fields.

`python docs/render_config.py > docs/config.md` updates the page; tests/test_docs.py fails when the
committed page differs from the output.
"""

from __future__ import annotations

import json
import sys
from typing import Annotated, Literal, get_args, get_origin

from pydantic import BaseModel

from clue_ds.config import RunConfig

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


def _type(annotation: object) -> str:
    """How an annotation is shown: `int or null`, `adamw, lamb`, `list of str`, `str -> float`."""
    if get_origin(annotation) is Literal:
        return ", ".join(map(str, get_args(annotation)))
    if get_origin(annotation) is dict:
        return " -> ".join(map(_type, get_args(annotation)))
    if get_origin(annotation) is list:
        return f"list of {_type(get_args(annotation)[0])}"
    if get_origin(annotation) is Annotated:
        return _type(get_args(annotation)[0])
    if get_args(annotation):
        return " or ".join(map(_type, get_args(annotation)))
    return "null" if annotation is type(None) else annotation.__name__  # type: ignore[attr-defined]


def render() -> str:
    parts = [HEADER]
    sections: list[tuple[str, type[BaseModel]]] = [("", RunConfig)]
    for prefix, section in sections:
        title = prefix.rstrip(".") or "top level"
        parts.append(f"\n## {title}\n\n{section.__doc__}\n\n{TABLE_HEAD}")
        for name, field in section.model_fields.items():
            for each in get_args(field.annotation):
                if isinstance(each, type) and issubclass(each, BaseModel):  # a list of sections
                    sections.append((f"{prefix}{name}.N.", each))
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                sections.append((f"{prefix}{name}.", field.annotation))
                continue
            required = field.is_required()
            value = "" if required else json.dumps(field.default).replace('"', "")
            default = "required" if required else f"`{value}`"
            meaning = (field.description or "").replace("|", ", ")
            parts.append(
                f"| `{prefix}{name}` | {_type(field.annotation)} | {default} | {meaning} |\n"
            )
    return "".join(parts)


if __name__ == "__main__":
    sys.stdout.write(render())
