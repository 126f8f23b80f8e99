"""Models in and out of the layouts that others use.

`load` reads a run, a checkpoint or a Hugging Face directory into one form: a ModelConfig and a
state dict with transformers' names in fp32. `save` writes that form. `export` is the verb.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import tyro

from clue_ds.errors import UserError
from clue_ds.export import huggingface
from clue_ds.model.weights import TIED, StateDict, read_pretrained
from clue_ds.presets import ModelConfig

LAYOUTS: dict[str, Callable[..., Path]] = {"hf": huggingface.write}


class Source(NamedTuple):
    """A model, wherever it came from."""

    config: ModelConfig
    state_dict: StateDict
    vocab_file: Path
    lower_case: bool


def open_model(directory: str | Path) -> Source:
    """A run directory, a checkpoint or a Hugging Face directory, with its vocabulary.

    The vocabulary file may be missing (the weights are then still usable): who needs it checks.
    """
    directory = Path(directory)
    if (directory / "config.json").is_file():
        config, state = read_pretrained(directory)
        vocab_file = directory / "vocab.txt"
    elif directory.is_dir():
        # Imported here because it imports DeepSpeed, which takes seconds.
        from clue_ds.pretrain import checkpoint

        config, state, vocab_file = checkpoint.load_weights(directory)
    else:
        raise UserError(
            f"{directory} is not a directory; give a model directory or a run directory"
        )
    return Source(config, state, vocab_file, _lower_case(vocab_file))


def _lower_case(vocab_file: Path) -> bool:
    """What tokenizer_config.json beside the vocabulary says; BERT's default without one."""
    path = vocab_file.with_name("tokenizer_config.json")
    if not path.is_file():
        return True
    return bool(json.loads(path.read_text(encoding="utf-8")).get("do_lower_case", True))


def load(directory: str | Path) -> tuple[ModelConfig, StateDict]:
    """Config and weights of a run, a checkpoint or a Hugging Face directory.

    The state dict has the names of transformers' BertForPreTraining, fp32, without vocabulary
    padding, tied entries present and sharing storage; heads that are not there are left out.
    UserError: not a model directory, damaged weights, shapes that disagree with config.json.
    """
    source = open_model(directory)
    return source.config, source.state_dict


def save(
    config: ModelConfig,
    state_dict: StateDict,
    vocab_file: str | Path,
    directory: str | Path,
    to: str = "hf",
    lower_case: bool = True,
    force: bool = False,
) -> Path:
    """Write a model that others can load; returns `directory`.

    `to`: hf. The directory appears complete or not at all, and an existing one is replaced only
    with `force`. UserError: an unknown layout, a vocabulary of another size, a full disk.
    """
    if to not in LAYOUTS:
        raise UserError(f"can't export to {to!r}; layouts: {', '.join(LAYOUTS)}")
    return LAYOUTS[to](config, state_dict, vocab_file, directory, lower_case, force)


def export(
    run: tyro.conf.Positional[Path],
    to: str = "hf",
    output: Path | None = None,
    force: bool = False,
) -> None:
    """Write a run's newest checkpoint (or any model) in a layout that others load.

    Args:
        run: a run directory, one of its checkpoints, or a Hugging Face directory.
        to: hf (config.json, model.safetensors, vocab.txt and tokenizer files).
        output: where to write; default RUN/export/TO.
        force: replace the output directory if it exists.
    """
    if to not in LAYOUTS:
        raise UserError(f"can't export to {to!r}; layouts: {', '.join(LAYOUTS)}")
    if output is None:
        if not run.is_dir():
            raise UserError(f"{run} is not a directory; give a run directory")
        if not (run / "checkpoints").is_dir():
            raise UserError(f"{run} is not a run directory; say where to write with --output DIR")
        output = run / "export" / to
    source = open_model(run)
    save(*source[:3], output, to, source.lower_case, force)
    num_parameters = sum(t.numel() for n, t in source.state_dict.items() if n not in TIED)
    print(f"wrote {output}: {num_parameters:,} parameters, {source.config.vocab_size:,} words")
