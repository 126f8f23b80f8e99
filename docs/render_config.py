"""Print docs/config.md from the config's own descriptions.

`python docs/render_config.py > docs/config.md` remakes the page; tests/test_docs.py fails when the
committed page is not what this prints.
"""

from __future__ import annotations

import json
import sys
from typing import Literal, get_args, get_origin

from pydantic import BaseModel

from clue_ds.config import RunConfig

HEADER = """\
# The config of a run

One YAML file describes one run; every key can also stand on the command line, and what stands there
wins: `clue-ds pretrain --config run.yaml --train.lr 2e-4`. An unknown key, a wrong type or a number
out of range is an error that names the key. What a run really used is written to `RUN/config.yaml`.

Numbers that follow from others are not keys: gradient accumulation is
`global_batch_size / (micro_batch_size * ranks)`, predictions a sequence are
`ceil(mask_prob * seq_length)` unless given, the vocabulary's size is the corpus'.

The DeepSpeed JSON holds DeepSpeed's own keys only (ZeRO stage, offload, bucket sizes). Every number
that this config owns is `"auto"` there and filled in at the start; a JSON of yours that says
otherwise is refused with a list of all disagreements.

This page is made by `python docs/render_config.py` from `clue_ds/config.py`.
"""
TABLE_HEAD = "| key | type | default | meaning |\n|---|---|---|---|\n"


def _type(annotation: object) -> str:
    """`int or null`, `adamw, lamb`: how a value of this annotation is written in YAML."""
    if get_origin(annotation) is Literal:
        return ", ".join(map(str, get_args(annotation)))
    if get_args(annotation):
        return " or ".join(map(_type, get_args(annotation)))
    return "null" if annotation is type(None) else annotation.__name__  # type: ignore[attr-defined]


def render() -> str:
    parts = [HEADER]
    sections: list[tuple[str, type[BaseModel]]] = [("", RunConfig)]
    for prefix, section in sections:
        title = prefix.rstrip(".") or "the run"
        parts.append(f"\n## {title}\n\n{section.__doc__}\n\n{TABLE_HEAD}")
        for name, field in section.model_fields.items():
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
