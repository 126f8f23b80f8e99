"""Command lines that tyro parses: paths are expanded, and an option given twice is refused.

tyro, like argparse, would let the last of two equal options win without a word.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro
from pydantic import BaseModel, ValidationError
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructTypeInfo,
)

from clue_ds.errors import UserError
from clue_ds.settings import mistakes, paths

# Launchers append it to whatever the user wrote.
OF_LAUNCHERS = ("--local-rank",)

# Names of options that earlier versions had -> the one that all verbs have.
OLD_NAMES = {"--out": "--output", "--overwrite": "--force"}

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


@REGISTRY.primitive_rule
def _bool(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[bool] | None:
    """Where a bool takes a value: `true` and `false` as in YAML, and Python's spelling."""
    if info.type is not bool:
        return None
    values = {"true": True, "false": False, "True": True, "False": False}
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{true,false}",
        instance_from_str=lambda words: values[words[0]],
        choices=tuple(values),
        is_instance=lambda value: isinstance(value, bool),
        str_from_instance=lambda value: [str(value).lower()],
    )


_asked: list[type] = []  # sections for which `_section` is asking tyro at the moment


@REGISTRY.struct_rule
def _section(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Sections of settings, as tyro makes them, with our words for what pydantic finds wrong."""
    section = info.type
    if not (isinstance(section, type) and issubclass(section, BaseModel)) or section in _asked:
        return None
    _asked.append(section)  # so that the answer is that of tyro's own rule
    try:
        spec = ConstructorRegistry.get_struct_spec(info)
    finally:
        _asked.remove(section)

    def instantiate(**values: Any) -> BaseModel:
        try:
            made: BaseModel = section(**values)
        except ValidationError as error:
            raise ValueError(mistakes.explain(error, section)) from None
        return made

    if not isinstance(spec, StructConstructorSpec):
        return None
    return dataclasses.replace(spec, instantiate=instantiate)


def call(
    target: Callable[..., Any] | dict[str, Callable[..., Any]],
    prog: str,
    argv: list[str],
    quiet: bool = False,
) -> None:
    """Run a verb, or one of its subcommands, with the arguments in `argv`.

    `quiet`: print no notes, because another rank does.
    """
    if not isinstance(target, dict):
        argv = _renamed(target, prog, argv, quiet)
    refuse_repeated(argv)
    if isinstance(target, dict):
        tyro.extras.subcommand_cli_from_dict(
            target, prog=prog, args=argv, use_underscores=False, registry=REGISTRY
        )
    else:
        tyro.cli(target, prog=prog, args=argv, use_underscores=False, registry=REGISTRY)


def _renamed(target: Callable[..., Any], prog: str, argv: list[str], quiet: bool) -> list[str]:
    """`argv` with today's names of options; a note for each old one."""
    parameters = inspect.signature(target).parameters
    words = []
    for word in argv:
        name, equals, value = word.partition("=")
        new = OLD_NAMES.get(name)
        if new is not None and new.lstrip("-") in parameters:
            if not quiet:
                print(f"{prog}: note: {name} is now called {new}", file=sys.stderr)
            word = f"{new}{equals}{value}"
        words.append(word)
    return words


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
