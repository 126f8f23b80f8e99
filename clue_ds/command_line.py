"""The settings of a run from the command line: `[--config FILE] [--section.key value ...]`.

Guarantees: every key of the config is an option; what is given here wins over the file; an option
that is given twice is an error.
"""

from __future__ import annotations

import argparse
from typing import Any

import tyro
from pydantic import Field

from clue_ds.config import PathText, RunConfig, read_yaml, validate
from clue_ds.settings import arguments, paths


class CommandLine(RunConfig):
    """The settings of a run, as a command takes them."""

    config: PathText | None = Field(
        None, description="YAML file with these settings; options on the command line win over it"
    )


def parse(argv: list[str], prog: str) -> RunConfig:
    """A RunConfig from `[--config FILE] [--section.key value ...]`; the command line wins.

    tyro prints the help and errors in arguments itself and raises SystemExit.
    """
    arguments.refuse_repeated(argv)
    only_config = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only_config.add_argument("--config", type=paths.expand)
    argv = ["--extend=true" if word == "--extend" else word for word in argv]  # a switch
    known, _ = only_config.parse_known_args(argv)
    default = tyro.MISSING if known.config is None else _tyro_default(known.config)
    given = tyro.cli(
        CommandLine,
        prog=prog,
        description=(
            f"{RunConfig.__doc__} Write them in a YAML file (--config RUN.yaml), one level of "
            "nesting for each dot, or on the command line, which wins. Words may be joined by "
            "dashes or underscores. `clue-ds pretrain --dry-run` prints what every `auto` is on "
            "these devices, and trains nothing."
        ),
        args=argv,
        default=default,
        config=(tyro.conf.FlagConversionOff,),
        use_underscores=True,
        registry=arguments.REGISTRY,
    )
    return RunConfig(**{name: getattr(given, name) for name in RunConfig.model_fields})


def _tyro_default(path: str) -> Any:
    """The values of the file, checked; a required key that it lacks stays required as an option."""
    values = read_yaml(path)
    data = values.get("data")
    no_corpus = data is None or (isinstance(data, dict) and "corpus" not in data)
    no_run_dir = "run_dir" not in values
    if no_corpus:
        values["data"] = {**(data or {}), "corpus": "?"}
    checked = validate({"run_dir": "?", **values}, str(path))
    if no_corpus:
        section = checked.data.model_copy(update={"corpus": tyro.MISSING})
        checked = checked.model_copy(update={"data": section})
    if no_run_dir:
        checked = checked.model_copy(update={"run_dir": tyro.MISSING})
    named = {name: getattr(checked, name) for name in RunConfig.model_fields}
    return CommandLine.model_construct(**named, config=path)
