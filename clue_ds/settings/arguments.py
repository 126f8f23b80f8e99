"""Command lines that tyro parses: paths are expanded, and an option given twice is refused.

tyro, like argparse, would let the last of two equal options win without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from clue_ds.errors import UserError
from clue_ds.settings import paths

# Launchers append it to whatever the user wrote.
OF_LAUNCHERS = ("--local-rank",)

# An argument that is a path or something else, such as the name of a model on the hub.
PathOrName = Annotated[
    str,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="STR",
        instance_from_str=lambda words: paths.expand(words[0]),
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda value: [value],
    ),
]

REGISTRY = ConstructorRegistry()


@REGISTRY.primitive_rule
def _path(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Path] | None:
    if info.type is not Path:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: Path(paths.expand(words[0])),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda value: [str(value)],
    )


def call(
    target: Callable[..., Any] | dict[str, Callable[..., Any]], prog: str, argv: list[str]
) -> None:
    """Run a verb, or one of its subcommands, with the arguments in `argv`."""
    refuse_repeated(argv)
    if isinstance(target, dict):
        tyro.extras.subcommand_cli_from_dict(
            target, prog=prog, args=argv, use_underscores=False, registry=REGISTRY
        )
    else:
        tyro.cli(target, prog=prog, args=argv, use_underscores=False, registry=REGISTRY)


def refuse_repeated(argv: list[str]) -> None:
    """A UserError if an option occurs twice, in whatever spelling."""
    seen: dict[str, str] = {}
    for word in argv:
        if word == "--":
            return
        if not word.startswith("--"):
            continue
        option = word.partition("=")[0]
        key = option.replace("_", "-")
        if key in OF_LAUNCHERS:
            continue
        if key in seen:
            raise UserError(
                f"option {option} is given twice; give it once (several values follow one option, "
                "separated by spaces)"
            )
        seen[key] = option
