"""Google's BERT layout, read and written without TensorFlow.

    bert_model.ckpt.{data-00000-of-00001,index,meta}  bert_config.json  vocab.txt

In place of the checkpoint, an object checkpoint of TensorFlow 2 or an .h5 file of Keras is read,
if transformers, bert4keras, keras-bert or TensorFlow's Model Garden wrote it (model/keras_file.py).

One table of names serves both directions. Guarantees: a tensor that is written and read back has
the same bits; the files equal those of TensorFlow's Saver byte for byte. Optimizer slots are
dropped on reading, other variables that the table doesn't know are reported, and an encoder with a
missing tensor is refused.

bert_config.json always says "gelu", the only name that Google's code accepts, and Google's code
then computes the tanh form. The activation that the model was trained with is written under
another key, which Google's code ignores.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from clue_ds.errors import UserError
from clue_ds.export.huggingface import classes_of
from clue_ds.export.publish import (
    check_state,
    copy_vocab,
    read_tokens,
    staged,
    write_model_json,
)
from clue_ds.export.tf_files import bundle, graph, object_graph
from clue_ds.files import read_json
from clue_ds.model import keras_file
from clue_ds.model.finetuned import FineTuned
from clue_ds.model.weights import (
    CLASSIFIER_BIAS,
    CLASSIFIER_WEIGHT,
    DECODER_BIAS,
    DECODER_WEIGHT,
    NEXT_SENTENCE_WEIGHT,
    POINTER_HEAD,
    PREDICTION_BIAS,
    QA_BIAS,
    QA_WEIGHT,
    WORD_EMBEDDINGS,
    StateDict,
    is_tied,
    model_config,
)
from clue_ds.presets import ModelConfig
from clue_ds.vocab_file import checked_bool

PREFIX = "bert_model.ckpt"
CONFIG_FILE = "bert_config.json"
# The fields of Google's BertConfig. The others of ours are written too; Google's code ignores them.
CONFIG_KEYS = (
    "attention_probs_dropout_prob",
    "hidden_act",
    "hidden_dropout_prob",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "type_vocab_size",
    "vocab_size",
)
POSITIONS = "bert.embeddings.position_embeddings.weight"
TRUE_ACTIVATION = "hidden_act_in_transformers"
OPTIMIZER_SUFFIXES = ("/adam_m", "/adam_v", "/lamb_m", "/lamb_v", "/Adam", "/Adam_1")
OPTIMIZER_NAMES = ("global_step", "beta1_power", "beta2_power")


class Row(NamedTuple):
    """One tensor under both names; dense kernels are [in, out] in TensorFlow and [out, in] here."""

    theirs: str
    ours: str
    is_transposed: bool = False


def name_table(num_layers: int) -> list[Row]:
    """Every tensor that a BERT checkpoint may hold, heads included."""
    rows = [
        Row("bert/embeddings/word_embeddings", WORD_EMBEDDINGS),
        *(
            Row(f"bert/embeddings/{n}_embeddings", f"bert.embeddings.{n}_embeddings.weight")
            for n in ("position", "token_type")
        ),
        *_layer_norm("bert/embeddings/LayerNorm"),
    ]
    for number in range(num_layers):
        layer = f"bert/encoder/layer_{number}"
        for part in ("query", "key", "value"):
            rows += _dense(f"{layer}/attention/self/{part}")
        for part in ("attention/output", "output"):
            rows += [*_dense(f"{layer}/{part}/dense"), *_layer_norm(f"{layer}/{part}/LayerNorm")]
        rows += _dense(f"{layer}/intermediate/dense")
    return [
        *rows,
        *_dense("bert/pooler/dense"),
        *_dense("cls/predictions/transform/dense"),
        *_layer_norm("cls/predictions/transform/LayerNorm"),
        Row("cls/predictions/output_bias", PREDICTION_BIAS),
        # Only for an untied decoder; Google's decoder is always the word embeddings.
        *_dense("cls/predictions/decoder")[:1],
        Row("cls/seq_relationship/output_weights", NEXT_SENTENCE_WEIGHT),
        Row("cls/seq_relationship/output_bias", "cls.seq_relationship.bias"),
        Row("output_weights", CLASSIFIER_WEIGHT),
        Row("output_bias", CLASSIFIER_BIAS),
        # As in Google's run_squad.py.
        Row("cls/squad/output_weights", QA_WEIGHT),
        Row("cls/squad/output_bias", QA_BIAS),
    ]


def _ours(name: str) -> str:
    return name.replace("layer_", "layer.").replace("/", ".")


def _dense(name: str) -> list[Row]:
    kernel = Row(f"{name}/kernel", f"{_ours(name)}.weight", is_transposed=True)
    return [kernel, Row(f"{name}/bias", f"{_ours(name)}.bias")]


def _layer_norm(name: str) -> list[Row]:
    names = (("gamma", "weight"), ("beta", "bias"))
    return [Row(f"{name}/{theirs}", f"{_ours(name)}.{ours}") for theirs, ours in names]


# --------------------------------------------------------------------------------------- writing


def write(
    config: ModelConfig,
    state: StateDict,
    vocab_file: str | Path,
    directory: str | Path,
    lower_case: bool = True,
    force: bool = False,
    finetuned: FineTuned | None = None,
) -> Path:
    """Write the five files; arguments, guarantees and errors are those of huggingface.write."""
    directory = Path(directory)
    read_tokens(vocab_file, config.vocab_size)
    check_state(config, state, finetuned)
    if any(name.startswith(POINTER_HEAD) for name in state):
        raise UserError(
            "the layout tf has no place for the head `pointer`, which only clue_ds reads; export "
            "it with --to hf, or fine-tune the task with `head: softmax`"
        )
    with staged(directory, force) as place:
        place.mkdir()
        entries = bundle.write(place / PREFIX, _tensors(config, state))
        shapes = {name: entry.shape for name, entry in entries.items()}
        (place / f"{PREFIX}.meta").write_bytes(graph.meta_graph(shapes))
        values = config_json(config, lower_case) | classes_of(state, finetuned)
        write_model_json(place / CONFIG_FILE, values)
        copy_vocab(vocab_file, place)
    return directory


def _tensors(config: ModelConfig, state: StateDict) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of every variable, sorted by name, one at a time."""
    left_out = {DECODER_WEIGHT} if is_tied(state, DECODER_WEIGHT) else set()
    for row in sorted(name_table(config.num_hidden_layers)):
        if row.ours in state and row.ours not in left_out:
            tensor = state[row.ours].detach().float()
            yield row.theirs, (tensor.T if row.is_transposed else tensor).contiguous().numpy()


def config_json(config: ModelConfig, lower_case: bool) -> dict[str, Any]:
    """The content of bert_config.json: Google's 11 keys, and those that reading it back needs."""
    values = dataclasses.asdict(config)
    return {
        **{key: values[key] for key in CONFIG_KEYS},
        "hidden_act": "gelu",
        TRUE_ACTIVATION: config.hidden_act,
        "layer_norm_eps": config.layer_norm_eps,
        "pad_token_id": config.pad_token_id,
        "do_lower_case": lower_case,
    }


# --------------------------------------------------------------------------------------- reading


def find_prefix(directory: Path) -> Path:
    """Path of the checkpoint in `directory`, without its suffixes, or else of its .h5 file.

    Of several, it is the one called PREFIX, or else the newest by TensorFlow's own `checkpoint`.
    """
    found = sorted(path.with_suffix("") for path in directory.glob("*.index"))
    if directory / PREFIX in found:
        return directory / PREFIX
    found = found or _keras_files(directory)
    if len(found) == 1:
        return found[0]
    newest = _newest(directory)
    if newest in found:
        return newest
    names = ", ".join(path.name for path in found)
    if found:
        raise UserError(
            f"{directory} holds several checkpoints ({names}) and no file `checkpoint` that names "
            f"the newest of them; give one of them, such as {found[-1]}"
        )
    raise UserError(
        f"{directory} holds no .index, which each TensorFlow V2 checkpoint has{_old(directory)}; "
        f"give a directory with one, which is usually called {PREFIX}"
    )


def _keras_files(directory: Path) -> list[Path]:
    """The .h5 files in a directory, unless one is that of a Hugging Face directory."""
    return [] if (directory / keras_file.FILE).is_file() else sorted(directory.glob("*.h5"))


def _newest(directory: Path) -> Path:
    """The checkpoint that the file `checkpoint` of TensorFlow's Saver names, in `directory`."""
    path = directory / "checkpoint"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    said = re.search(r'^model_checkpoint_path: "(.*)"$', text, re.MULTILINE)
    # Often an absolute path of the machine that trained.
    return directory / Path(said[1]).name if said else directory


def _old(directory: Path) -> str:
    """What to say of a directory whose checkpoint is of format V1: a file beside its .meta."""
    for path in sorted(directory.glob("*.meta")):
        if path.with_suffix("").is_file():
            return (
                f"; {path.with_suffix('').name} is of format V1, which only TensorFlow 1 reads: "
                "restore it there, and save it with tf.train.Saver(write_version=2)"
            )
    return ""


def of_prefix(where: str | Path) -> Path | None:
    """The prefix that `where` is, if a checkpoint, the .index of one, or an .h5 file is given."""
    if _is_keras(Path(where)):
        return Path(where) if Path(where).is_file() else None
    prefix = Path(str(where).removesuffix(".index"))
    return prefix if bundle.index_file(prefix).is_file() else None


def _is_keras(prefix: Path) -> bool:
    return prefix.suffix == ".h5"


def read_config(directory: Path, prefix: Path | None = None) -> dict[str, Any]:
    """bert_config.json, or the first *config*.json, with hidden_act in Hugging Face's meaning.

    "gelu" means what the program that wrote the checkpoint computes, which is the tanh form in
    Google's. `prefix`: which checkpoint.
    """
    values = _config_values(directory)
    program = None
    if values.get("hidden_act") == "gelu":
        program = program_of(prefix or find_prefix(directory))
    return _with_our_activation(values, program)


def _config_values(directory: Path) -> dict[str, Any]:
    """The config as it stands in its file."""
    paths = [directory / CONFIG_FILE, *sorted(directory.glob("*config*.json"))]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise UserError(
            f"{directory} has a checkpoint but no config; copy the model's {CONFIG_FILE} into it, "
            "or the config.json of a model of transformers"
        )
    return read_json(path)


def _with_our_activation(
    values: dict[str, Any], program: keras_file.Program | None
) -> dict[str, Any]:
    if values.get("hidden_act") != "gelu":
        return values
    meant = values.get(TRUE_ACTIVATION, program.gelu if program else "gelu_new")
    return {**values, "hidden_act": meant}


def program_of(prefix: Path) -> keras_file.Program | None:
    """The program of Keras that wrote a checkpoint; None for one with Google's names."""
    if _is_keras(prefix):
        return keras_file.program_of_file(prefix)
    reader = bundle.Reader(prefix)
    if not object_graph.is_object_checkpoint(reader):
        return None
    return keras_file.program_of(object_graph.variables(reader))


class Contents(NamedTuple):
    """What `read` finds. `left_out`: names of variables; `values`: as `read_config`."""

    config: ModelConfig
    state: StateDict
    left_out: list[str]
    values: dict[str, Any]
    program: keras_file.Program | None


def read(directory: Path, prefix: Path | None = None) -> Contents:
    """A model in this layout. `prefix`: which of the directory's checkpoints.

    vocab_size is the number of rows in the checkpoint, even if bert_config.json says otherwise, and
    so is max_position_embeddings if Keras wrote it.
    """
    prefix = prefix or find_prefix(directory)
    values = _config_values(directory)
    program = program_of(prefix)
    values = _with_our_activation(values, program)
    config = model_config({**values, "model_type": "bert"}, directory / CONFIG_FILE)
    known = name_table(config.num_hidden_layers)
    left_out: list[str] = []
    if _is_keras(prefix):
        state = keras_file.read(prefix)
    else:
        state, left_out = _read_bundle(bundle.Reader(prefix), known)
    ours = {row.ours for row in known}
    left_out += [name for name in state if name not in ours]
    state = {name: tensor for name, tensor in state.items() if name in ours}
    if WORD_EMBEDDINGS not in state or state[WORD_EMBEDDINGS].dim() != 2:
        raise UserError(f"{prefix}: the word embeddings are no matrix; download it again")
    if DECODER_WEIGHT in state and PREDICTION_BIAS in state:
        state[DECODER_BIAS] = state[PREDICTION_BIAS]
    config = config.replace(vocab_size=len(state[WORD_EMBEDDINGS]))
    if program is not None and POSITIONS in state:
        # keras-bert keeps as many positions as the texts in training were long.
        config = config.replace(max_position_embeddings=len(state[POSITIONS]))
    return Contents(config, state, left_out, values, program)


def _read_bundle(reader: bundle.Reader, table: list[Row]) -> tuple[StateDict, list[str]]:
    """(tensors in our names, variables that are none of them) of a checkpoint of TensorFlow."""
    is_object = object_graph.is_object_checkpoint(reader)
    keys = object_graph.variables(reader) if is_object else {name: name for name in reader.entries}
    if table[0].theirs in keys:
        rows = {row.theirs: row for row in table}
        state: StateDict = {}
        for name, row in rows.items():
            if name in keys:
                tensor = torch.from_numpy(reader.read(keys[name])).float()
                turns = row.is_transposed and tensor.dim() == 2
                state[row.ours] = tensor.T.contiguous() if turns else tensor
        return state, [name for name in keys if name not in rows and not _is_optimizer(name)]
    program = keras_file.program_of(keys)
    if program is None:
        raise _unknown(reader, keys, is_object)
    names = keras_file.renamed(program, keys, reader.path)
    tensors = {
        ours: keras_file.in_our_shape(ours, reader.read(keys[n])) for n, ours in names.items()
    }
    return tensors, [name for name in keys if name not in names and not _is_optimizer(name)]


def _unknown(reader: bundle.Reader, names: Iterable[str], is_object: bool) -> UserError:
    if is_object:
        return UserError(
            f"{reader.path} is an object checkpoint of TensorFlow 2 whose variables are named "
            "otherwise than in the BERTs of Google, transformers, bert4keras, keras-bert and "
            f"TensorFlow's Model Garden: {keras_file.some(names)}; load it in the program that "
            "wrote it, and save it with transformers (save_pretrained), with bert4keras "
            "(save_weights_as_checkpoint) or with tf.compat.v1.train.Saver under Google's names"
        )
    return UserError(
        f"{reader.path} has no bert/embeddings/word_embeddings; only checkpoints with the "
        f"variable names of Google's BERT can be read (this one holds {keras_file.some(names)})"
    )


def _is_optimizer(name: str) -> bool:
    return name.endswith(OPTIMIZER_SUFFIXES) or name in OPTIMIZER_NAMES


def is_checkpoint(directory: Path) -> bool:
    """Whether `directory` holds a TensorFlow checkpoint, or an .h5 file that takes its place."""
    patterns = ("*.index", f"{PREFIX}*", "*.ckpt*.meta", "*.ckpt*.data-*")
    is_bundle = any(any(directory.glob(pattern)) for pattern in patterns)
    return is_bundle or bool(_keras_files(directory))


def lower_case(directory: Path) -> bool | None:
    """do_lower_case of a bert_config.json that we wrote; None in one written by others."""
    path = directory / CONFIG_FILE
    said = read_json(path).get("do_lower_case") if path.is_file() else None
    return None if said is None else checked_bool(said, "do_lower_case", path)
