"""Models out of whatever holds them, in one form.

    a run or one of its checkpoints       checkpoints/, manifest.json
    a Hugging Face directory              config.json, model.safetensors or pytorch_model.bin
    a directory in Google's layout        bert_config.json, bert_model.ckpt.*
    a zip of one of the last two          upstream's CLUE downloads
    a name on the Hugging Face hub        clue/roberta_chinese_clue_tiny

Guarantees: files decide, not names: the number of words is that of the embedding's rows, whatever
the config says, and a "roberta" with BERT's weights and vocabulary is a BERT (as CLUE's are).
Nothing of a download is executed. What was corrected or left out is said in `OpenedModel.notes`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from clue_ds import vocab_file as vocab_files
from clue_ds.errors import UserError
from clue_ds.export import archives, hub, tensorflow
from clue_ds.files import read_json
from clue_ds.model import weights
from clue_ds.model.weights import WORD_EMBEDDINGS, StateDict
from clue_ds.presets import ModelConfig

HF_CONFIGS = ("config.json", tensorflow.CONFIG_FILE)


class OpenedModel(NamedTuple):
    """A model, wherever it came from."""

    config: ModelConfig
    state_dict: StateDict
    vocab_file: Path
    lower_case: bool
    notes: tuple[str, ...] = ()


@contextmanager
def opened(where: str | Path, layout: str | None = None) -> Iterator[OpenedModel]:
    """`open_model` of a directory, a zip or a name on the hub; its files live as long as the block.

    `layout`: "hf" or "tf" where a directory holds both; default the one whose weights are there.
    """
    if hub.is_name(where):
        yield open_model(hub.download(str(where)), layout)
    elif archives.is_archive(where):
        with archives.unpacked(where) as directory:
            yield open_model(directory, layout)
    else:
        yield open_model(where, layout)


def open_model(directory: str | Path, layout: str | None = None) -> OpenedModel:
    """A run, a checkpoint, or a directory in Hugging Face's or Google's layout.

    The vocabulary file may be missing (the weights are then still usable): who needs it checks.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(
            f"{directory} is not a directory; give a model directory or a run directory"
        )
    if layout is None:
        layout = _layout(directory)
    if layout == "tf":
        return _open_tf(directory)
    if layout == "hf":
        return _open_hf(directory)
    # Imported here because it imports DeepSpeed, which takes seconds.
    from clue_ds.checkpoint import masters

    config, state, vocab_file = masters.load_weights(directory)
    return OpenedModel(config, state, vocab_file, vocab_files.lower_case(vocab_file))


def _layout(directory: Path) -> str:
    """hf, tf or run."""
    names = [n + end for n in weights.WEIGHT_FILES for end in ("", ".index.json")]
    if any((directory / name).is_file() for name in names):
        return "hf"
    if tensorflow.is_checkpoint(directory):
        return "tf"
    return "hf" if any((directory / name).is_file() for name in HF_CONFIGS) else "run"


def _open_tf(directory: Path) -> OpenedModel:
    config, state, left_out = tensorflow.read(directory)
    said = tensorflow.read_config(directory)["vocab_size"]
    weights.check_shapes(config, state, directory)
    notes = _notes(config, said) + _left_out(left_out, directory)
    lower_case = tensorflow.lower_case(directory)
    vocab_file = directory / "vocab.txt"
    if lower_case is None:
        lower_case = vocab_files.lower_case(vocab_file)
    return OpenedModel(config, weights.tie(state, directory), vocab_file, lower_case, notes)


def _open_hf(directory: Path) -> OpenedModel:
    paths = [directory / name for name in HF_CONFIGS]
    path = next((path for path in paths if path.is_file()), paths[0])
    values = weights.read_config_json(directory) if path == paths[0] else read_json(path)
    vocab_file = directory / "vocab.txt"
    notes: tuple[str, ...] = ()
    if values.get("model_type") == "roberta" and _is_bert_vocab(vocab_file):
        values["model_type"] = "bert"
        notes = (f'{path.name} says "roberta"; the weights and the vocabulary are BERT\'s',)
    said = weights.model_config(values, path)
    state = weights.read_weights(directory)
    config = said.replace(vocab_size=len(state[WORD_EMBEDDINGS]))
    weights.check_shapes(config, state, directory)
    known = weights.expected_shapes(config)
    foreign = [n for n in state if n not in known and not n.startswith("classifier.")]
    notes += _notes(config, said.vocab_size) + _left_out(foreign, directory)
    state = weights.tie({n: t for n, t in state.items() if n not in foreign}, directory)
    return OpenedModel(config, state, vocab_file, vocab_files.lower_case(vocab_file), notes)


def _notes(config: ModelConfig, said: int) -> tuple[str, ...]:
    if said == config.vocab_size:
        return ()
    return (f"the config says vocab_size {said:,}; the weights have {config.vocab_size:,} words",)


def _left_out(names: list[str], directory: Path) -> tuple[str, ...]:
    """What to say of tensors that have no place in BertForPreTraining; UserError for layers."""
    layers = [name for name in names if name.startswith(("bert/encoder/", "bert.encoder."))]
    if layers:
        raise UserError(
            f"{directory} holds {layers[0]} and {len(layers) - 1} more tensors of an encoder that "
            "its config does not describe; correct num_hidden_layers, or take the config that "
            "belongs to it"
        )
    if not names:
        return ()
    return (f"left out {len(names)} tensors that are not BERT's: {', '.join(sorted(names))}",)


def _is_bert_vocab(vocab_file: Path) -> bool:
    """Whether this is a vocabulary of BERT's kind; real RoBERTa has none (or another file)."""
    if not vocab_file.is_file():
        return False
    return set(vocab_files.SPECIAL_TOKENS) <= set(vocab_files.vocab_lines(vocab_file))
