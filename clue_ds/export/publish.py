"""What all layouts share: checks of the model and its vocabulary, and publishing in one step.

Guarantees: a directory is complete or absent (it is written under a temporary name beside its
place, then renamed); an existing one is replaced only with `force`, and only when it holds a model;
no temporary file is left.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors

from clue_ds import files
from clue_ds.errors import UserError
from clue_ds.model.finetuned import FineTuned
from clue_ds.model.weights import (
    CLASSIFIER_BIAS,
    CLASSIFIER_WEIGHT,
    HEADS,
    TASK_HEADS,
    WORD_EMBEDDINGS,
    StateDict,
    check_finite,
    expected_shapes,
    lacking,
)
from clue_ds.presets import ModelConfig
from clue_ds.vocab_file import (
    VOCAB_TEXT,
    check_special_tokens,
    is_text,
    vocab_lines,
    write_tokens,
)

# A directory with one of these holds a model, so --force may replace it.
MODEL_FILES = ("config.json", "bert_config.json")


@contextmanager
def staged(target: str | Path, force: bool) -> Iterator[Path]:
    """A temporary path where the block creates a file or directory, renamed to `target` at its end.

    UserError when `target` exists and `force` is false, holds something other than a model, or
    can't be written; it is then unchanged.
    """
    target = Path(target)
    _check_target(target, force)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # The temporary directory has mode 0700; a directory inside it follows the user's umask.
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
            # Keeps the target's name, because its suffix can matter (.zip).
            place = Path(scratch) / "new" / target.name
            place.parent.mkdir()
            yield place
            if target.exists():
                target.rename(Path(scratch) / "old")
            place.rename(target)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(
            f"can't write {target}: {error}; free some space or choose another --output"
        ) from None


def _check_target(target: Path, force: bool) -> None:
    if not target.exists():
        return
    if not force:
        raise UserError(f"{target} exists; give --force to replace it, or another --output")
    if target.is_dir():
        replaceable = any((target / name).is_file() for name in MODEL_FILES)
        replaceable = replaceable or not any(target.iterdir())
    else:
        replaceable = target.suffix == ".zip"
    if not replaceable:
        raise UserError(
            f"{target} exists and is not a model directory, which is all that --force replaces; "
            "give another --output"
        )


def read_tokens(vocab_file: str | Path, vocab_size: int) -> list[str]:
    """The tokens of a vocabulary; UserError unless they are `vocab_size`, with the special ones."""
    tokens = vocab_lines(vocab_file)
    if len(tokens) != vocab_size:
        raise UserError(
            f"vocabulary {vocab_file} has {len(tokens):,} tokens but the model has {vocab_size:,} "
            "words; give the vocabulary that it was trained with"
            + (f". {lost_line(vocab_size - len(tokens))}" if len(tokens) < vocab_size else "")
        )
    check_special_tokens(tokens, vocab_file)
    return tokens


def lost_line(num_rows: int) -> str:
    """What to do about `num_rows` more rows than tokens, which may mean that ids have moved."""
    return (
        f"If lines were removed from it, every id after them means another row: put them back as "
        f"[unused-a] and so on. Only if the last {num_rows:,} rows are padding, which no text "
        "uses, drop them: clue-ds export MODEL --trim-vocab"
    )


def check_state(config: ModelConfig, state: StateDict, finetuned: FineTuned | None = None) -> None:
    """UserError for weights that readers would fill up with random numbers, or could not load.

    Heads may be absent, but not incomplete. `finetuned` must have a label for each class, or none.
    """
    if WORD_EMBEDDINGS not in state:
        raise UserError(
            f"the state dict has no {WORD_EMBEDDINGS}: it is not a BERT encoder; give the state "
            "dict of a BertForPreTraining"
        )
    expected = expected_shapes(config)
    for name, tensor in state.items():
        if name in expected and tensor.shape != expected[name]:
            raise UserError(
                f"{name} is {tuple(tensor.shape)} but the config says {tuple(expected[name])}"
            )
        if name not in expected and not name.startswith(TASK_HEADS):
            raise UserError(
                f"the state dict holds {name}, which is no tensor of BertForPreTraining; remove it"
            )
    check_finite(state, "the state dict")
    for head, missing in lacking(config, state).items():
        if any(name.startswith(HEADS[head]) for name in state):
            raise UserError(
                f"the {head} lacks {', '.join(missing)}, which readers would fill with random "
                "weights; use complete weights, or leave the heads out: clue-ds export MODEL "
                "--drop-heads"
            )
    num_classes = len(state[CLASSIFIER_WEIGHT]) if CLASSIFIER_WEIGHT in state else None
    labels = finetuned.labels if finetuned is not None else ()
    is_other = any(name.startswith(TASK_HEADS) for name in state) and num_classes is None
    if labels and len(labels) != num_classes and not is_other:
        raise UserError(
            f"there are {len(labels)} labels for a model with {num_classes or 'no'} "
            "classes; give one label for each class of the weights"
        )
    if CLASSIFIER_WEIGHT in state and CLASSIFIER_BIAS not in state:
        raise UserError(
            f"the classifier lacks {CLASSIFIER_BIAS}, which readers would fill with random "
            "weights; use complete weights"
        )


def write_model_json(path: Path, values: dict[str, Any] | list[dict[str, Any]]) -> None:
    """Write a JSON file of a model as transformers does: sorted keys, two spaces."""
    files.write_json(path, values, indent=2, sort_keys=True)


def copy_vocab(vocab_file: str | Path, directory: Path) -> None:
    """Copy a vocab.txt into `directory`, or write it from a tokenizer.json."""
    if is_text(vocab_file):
        shutil.copyfile(vocab_file, directory / VOCAB_TEXT)
    else:
        write_tokens(vocab_lines(vocab_file), directory / VOCAB_TEXT)
