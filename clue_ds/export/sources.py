"""Opens a model in any form that clue_ds reads, as an `OpenedModel`.

    a run or one of its checkpoints       checkpoints/, manifest.json
    a Hugging Face directory              config.json, model.safetensors or pytorch_model.bin
    a directory in Google's layout        bert_config.json, bert_model.ckpt.* or an .h5 of Keras
    a directory in UER's layout           a config with "heads_num", one .bin
    a zip of one of the last three        the form of CLUE's downloads
    one of several TF checkpoints         its prefix, its .index, or an .h5 file
    what `clue-ds finetune` wrote         a run, a task's directory, or the model in it
    a name on the Hugging Face hub        clue/roberta_chinese_clue_tiny
    a name on ModelScope                  modelscope:ORG/NAME

Guarantees: the weights take precedence over the config. The vocabulary has as many words as the
embedding has rows, and a "roberta" with BERT's weights and vocabulary is opened as a BERT (CLUE's
models are such). Every weight is finite. No code in a download is executed: only a local directory
that the user names is ever read as a run, because a run's checkpoints are pickles, and a zip or a
download that looks like one is refused. `OpenedModel.notes` lists what was corrected or left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from clue_ds import vocab_file as vocab_files
from clue_ds.errors import UserError
from clue_ds.export import archives, hub, tensorflow
from clue_ds.export.legacy import uer
from clue_ds.files import read_json
from clue_ds.model import finetuned, keras_file, weights
from clue_ds.model.finetuned import FineTuned
from clue_ds.model.weights import (
    CLASSIFIER_WEIGHT,
    SEGMENT_EMBEDDINGS,
    WORD_EMBEDDINGS,
    StateDict,
)
from clue_ds.presets import ModelConfig

HF_CONFIGS = ("config.json", tensorflow.CONFIG_FILE)


class OpenedModel(NamedTuple):
    """Config, weights and tokenizer of a model; `notes` are sentences to show to the user.

    `vocab_file` is a vocab.txt or a tokenizer.json, and may not exist. `finetuned`: what a model
    with a classifier carries beside its weights.
    """

    config: ModelConfig
    state_dict: StateDict
    vocab_file: Path
    lower_case: bool
    notes: tuple[str, ...] = ()
    finetuned: FineTuned | None = None


@contextmanager
def opened(where: str | Path, layout: str | None = None) -> Iterator[OpenedModel]:
    """`open_model` of a directory, a zip, a TensorFlow checkpoint or a name on the hub.

    Files may be gone after the block. `layout`: "hf" or "tf", for a directory that holds both; by
    default the hf weights are read.
    """
    with _located(where, layout) as (directory, found):
        yield open_model(directory, found, tensorflow.of_prefix(where))


@contextmanager
def _located(where: str | Path, layout: str | None = None) -> Iterator[tuple[Path, str]]:
    """The directory that holds the files of a model, unpacked or downloaded, and its layout."""
    prefix = tensorflow.of_prefix(where)
    if hub.is_name(where):
        yield _open_download(hub.download(str(where)), layout, where)
    elif prefix is not None:
        yield prefix.parent, "tf"
    elif archives.is_archive(where):
        with archives.unpacked(where) as directory:
            yield _open_download(directory, layout, where)
    else:
        directory = of_finetuning(existing(Path(where)))
        yield directory, layout or _layout(directory)


def _open_download(directory: Path, layout: str | None, where: str | Path) -> tuple[Path, str]:
    """A directory that others packed, which is never a run, and its layout."""
    layout = layout or _layout(directory)
    if layout == "run":
        raise UserError(
            f"{where} holds no model directory (config.json or bert_config.json with weights). A "
            "run or checkpoint is read only from a local directory, because its files could "
            "execute code: if you trust it, unpack it and give the directory"
        )
    return directory, layout


def existing(directory: Path) -> Path:
    """`directory`; UserError when there is none."""
    if not directory.is_dir():
        raise UserError(
            f"{directory} is not a directory; give a model directory, a run directory, a zip, or "
            "the name of a model on the Hugging Face hub (OWNER/NAME, or bert-base-chinese) or on "
            "ModelScope (modelscope:ORG/NAME)"
        )
    return directory


def of_finetuning(directory: Path) -> Path:
    """The model of a directory that `clue-ds finetune` wrote: a run's, or a task's best one."""
    for place in (directory, directory / "best"):
        if (place / "run.json").is_file() and not (place / "config.json").is_file():
            if (place / "model").is_dir():
                return place / "model"
            raise UserError(
                f"{place} is a fine-tuning run without a model: it has not finished, or another "
                f"run was better and only its model was kept; give {place.parent / 'best'}"
            )
    return directory


def hidden_act(where: str | Path) -> str:
    """The activation that a model was trained with; the weights are not read."""
    with _located(where) as (directory, layout):
        if layout == "tf":
            values = tensorflow.read_config(directory, tensorflow.of_prefix(where))
            path = directory / tensorflow.CONFIG_FILE
            return weights.model_config({**values, "model_type": "bert"}, path).hidden_act
        if layout == "uer":
            return uer.read_config(directory)["hidden_act"]
        if layout == "hf":
            return weights.model_config(*_hf_config(directory)[:2]).hidden_act
        from clue_ds.checkpoint import masters

        return str(masters.choose(directory).manifest.model["hidden_act"])


def open_model(
    directory: str | Path, layout: str | None = None, prefix: Path | None = None
) -> OpenedModel:
    """Open a run, a checkpoint, or a directory in the layout of Hugging Face, Google or UER.

    `directory` must be one that the user named: files of a run can execute code. `prefix`: which of
    several TensorFlow checkpoints. The vocabulary file may be missing, because the weights are
    usable without it; callers that need it check. UserError: not a model directory, damaged
    weights, shapes that disagree.
    """
    directory = of_finetuning(existing(Path(directory)))
    if layout is None:
        layout = _layout(directory)
    if layout == "tf":
        return _open_tf(directory, prefix)
    if layout == "uer":
        return _open_uer(directory)
    if layout == "hf":
        return _open_hf(directory)
    for inside in (directory / "model", directory / "best" / "model"):
        if (inside / HF_CONFIGS[0]).is_file() and not (directory / "checkpoints").is_dir():
            raise UserError(
                f"{directory} holds fine-tuning and not the model itself; give the model: {inside}"
            )
    # Imported here because it imports DeepSpeed, which takes seconds.
    from clue_ds.checkpoint import masters

    choice = masters.choose(directory)
    config, state, vocab_file = masters.load_weights(choice)
    weights.check_finite(state, directory)
    notes = _share_segment_vector(state) if _saw_one_segment(choice.manifest.config) else ()
    return OpenedModel(config, state, vocab_file, vocab_files.lower_case(vocab_file), notes)


def _saw_one_segment(config: dict[str, Any]) -> bool:
    """Whether no training so far has seen a second segment, by the config of a run.

    A model that the run started from may have been trained with pairs, so its vector is kept.
    """
    return config["train"]["objective"] == "mlm" and config["model"]["init"] is None


def _share_segment_vector(state: StateDict) -> tuple[str, ...]:
    """Give the second segment the vector of the first one, in place; returns a note on it.

    The first one's is added to every token in training, and so takes part in all that the network
    has learned. With random numbers in its place, every token of a pair's second text would look
    unlike any that the network has seen. (docs/recipe-study.md has what that costs.)
    """
    table = state[SEGMENT_EMBEDDINGS]
    state[SEGMENT_EMBEDDINGS] = table[:1].expand_as(table).contiguous()
    return ("objective mlm trains no second segment, so token type 1 has the vector of type 0",)


def _layout(directory: Path) -> str:
    """The layout of a directory: hf, tf, uer, or run (which includes checkpoints)."""
    if uer.find_config(directory) is not None:
        return "uer"
    names = [n + end for n in weights.WEIGHT_FILES for end in ("", ".index.json")]
    # A link that leads nowhere is named when it is opened.
    if any((directory / name).is_file() or (directory / name).is_symlink() for name in names):
        return "hf"
    if tensorflow.is_checkpoint(directory):
        return "tf"
    return "hf" if any((directory / name).is_file() for name in HF_CONFIGS) else "run"


def _open_tf(directory: Path, prefix: Path | None = None) -> OpenedModel:
    config, state, left_out, values, program = tensorflow.read(directory, prefix)
    weights.check_shapes(config, state, directory)
    notes = _notes(config, values["vocab_size"]) + _left_out(left_out, directory)
    notes += _of_keras(config, values, program)
    lower_case = tensorflow.lower_case(directory)
    vocab_file = vocab_files.find(directory)
    if lower_case is None:
        lower_case = vocab_files.lower_case(vocab_file)
    about = _finetuned(values, state, directory / tensorflow.CONFIG_FILE)
    state = weights.tie(state, directory)
    return OpenedModel(config, state, vocab_file, lower_case, notes, about)


def _of_keras(
    config: ModelConfig, values: dict[str, Any], program: keras_file.Program | None
) -> tuple[str, ...]:
    """Notes on a checkpoint that a program of Keras wrote."""
    if program is None:
        return ()
    notes = [f"the weights have the names of {program.name}"]
    said, found = values.get("max_position_embeddings"), config.max_position_embeddings
    if said is not None and said != found:
        notes.append(f"the config says {said} positions, but the weights have {found}")
    if program == keras_file.BERT4KERAS and config.hidden_act == "gelu":
        notes.append(
            "bert4keras computes the erf GELU unless the program calls set_gelu('tanh'); if it "
            "did, import the model with --hidden-act gelu_new"
        )
    return tuple(notes)


def _open_uer(directory: Path) -> OpenedModel:
    config, state, left_out = uer.read(directory)
    weights.check_shapes(config, state, directory)
    vocab_file = vocab_files.find(directory)
    lower_case = vocab_files.lower_case(vocab_file)
    notes = (*_left_out(left_out, directory), uer.NOTE)
    return OpenedModel(config, weights.tie(state, directory), vocab_file, lower_case, notes)


def _hf_config(directory: Path) -> tuple[dict[str, Any], Path, tuple[str, ...]]:
    """(content of the config, its path, notes); a "roberta" that is a BERT becomes one."""
    paths = [directory / name for name in HF_CONFIGS]
    path = next((path for path in paths if path.is_file()), paths[0])
    values = weights.read_config_json(directory) if path == paths[0] else read_json(path)
    notes: tuple[str, ...] = ()
    if values.get("model_type") == "roberta" and _is_bert_vocab(vocab_files.find(directory)):
        values["model_type"] = "bert"
        notes = (f'{path.name} says "roberta", but the weights and the vocabulary are BERT\'s',)
    return values, path, notes


def _open_hf(directory: Path) -> OpenedModel:
    values, path, notes = _hf_config(directory)
    vocab_file = vocab_files.find(directory)
    said = weights.model_config(values, path)
    state, notes_on_names = weights.read_weights(directory)
    config = said.replace(vocab_size=len(state[WORD_EMBEDDINGS]))
    weights.check_shapes(config, state, directory)
    known = weights.expected_shapes(config)
    foreign = [n for n in state if n not in known and not n.startswith(weights.TASK_HEADS)]
    notes += notes_on_names + _notes(config, said.vocab_size) + _left_out(foreign, directory)
    state = weights.tie({n: t for n, t in state.items() if n not in foreign}, directory)
    about, lower_case = _finetuned(values, state, path), vocab_files.lower_case(vocab_file)
    return OpenedModel(config, state, vocab_file, lower_case, notes, about)


def _finetuned(values: dict[str, Any], state: StateDict, path: Path) -> FineTuned | None:
    """What the config at `path` says of the fine-tuned head among the weights, if there is one."""
    if not any(name.startswith(weights.TASK_HEADS) for name in state):
        return None
    said = values.get("id2label") or ()
    return finetuned.read(values, len(state.get(CLASSIFIER_WEIGHT, said)), path)


def _notes(config: ModelConfig, said: int) -> tuple[str, ...]:
    if said == config.vocab_size:
        return ()
    return (
        f"the config says vocab_size {said:,}, but the weights have {config.vocab_size:,} words",
    )


def _left_out(names: list[str], directory: Path) -> tuple[str, ...]:
    """A note about tensors that BertForPreTraining doesn't have; UserError if they are layers."""
    layers = [name for name in names if name.startswith(("bert/encoder/", "bert.encoder."))]
    if layers:
        raise UserError(
            f"{directory} holds {layers[0]} and {len(layers) - 1} more tensors of an encoder that "
            "its config does not describe; correct num_hidden_layers, or use the config that "
            "belongs to the weights"
        )
    averages = [name for name in names if name.endswith("/ExponentialMovingAverage")]
    if averages:
        rest = _left_out([name for name in names if name not in averages], directory)
        return (
            f"left out {len(averages)} moving averages (.../ExponentialMovingAverage), which the "
            "trainer kept beside the weights; the weights themselves are read",
            *rest,
        )
    if not names:
        return ()
    return (f"left out {len(names)} tensors that are not BERT's: {', '.join(sorted(names))}",)


def _is_bert_vocab(vocab_file: Path) -> bool:
    """Whether this is a BERT vocabulary; a real RoBERTa has no vocab.txt, or another one."""
    if not vocab_file.is_file():
        return False
    try:
        tokens = vocab_files.vocab_lines(vocab_file)
    except UserError:
        if vocab_files.is_text(vocab_file):
            raise
        return False  # the tokenizer.json of a real RoBERTa
    return set(vocab_files.SPECIAL_TOKENS) <= set(tokens)
