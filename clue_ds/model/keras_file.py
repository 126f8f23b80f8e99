"""Weights that Keras saved, read into today's names: variables' names, and the .h5 files.

Four programs name the variables of a BERT in a way of their own, and each is known by one of these
names: transformers' TensorFlow classes, bert4keras, keras-bert, and TensorFlow's Model Garden. The
names are the same in an .h5 file and in an object checkpoint of TensorFlow 2 (as the `full_name` of
a variable), so one table serves both.

Guarantees: only arrays of numbers are read, by h5py, without TensorFlow. A variable is found by its
own name, never by its position in the file: scopes before it, and the numbers that Keras appends to
make names unique, are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from clue_ds.errors import UserError, first_line
from clue_ds.files import refuse_placeholder

FILE = "tf_model.h5"
# What the last part of a variable's name is called in PyTorch.
PARTS = {
    "kernel": "weight",
    "embeddings": "weight",
    "weight": "weight",
    "gamma": "weight",
    "beta": "bias",
    "bias": "bias",
}


class Program(NamedTuple):
    """A program that trains BERTs in Keras.

    `gelu` is what it computes where its config says gelu: "gelu" (erf) or "gelu_new" (tanh).
    `known_by` matches the name of one variable that only its models have.
    """

    name: str
    gelu: str
    known_by: str


TRANSFORMERS = Program("transformers", "gelu", r"(^|/)bert/embeddings/word_embeddings/weight$")
BERT4KERAS = Program("bert4keras", "gelu", r"(^|/)Transformer-0-MultiHeadSelfAttention(_\d+)?/")
KERAS_BERT = Program("keras-bert", "gelu_new", r"(^|/)Encoder-1-MultiHeadSelfAttention(_\d+)?/")
GARDEN = Program("TensorFlow's Model Garden", "gelu_new", r"(^|/)word_embeddings/embeddings$")
PROGRAMS = (TRANSFORMERS, BERT4KERAS, KERAS_BERT, GARDEN)

# Layers of bert4keras and of keras-bert outside the encoder. The encoder's are called
# Transformer-0-... in the one and Encoder-1-... in the other.
KERAS_LAYERS = {
    "Embedding-Token": "bert.embeddings.word_embeddings",
    "Embedding-Segment": "bert.embeddings.token_type_embeddings",
    "Embedding-Position": "bert.embeddings.position_embeddings",
    "Embedding-Norm": "bert.embeddings.LayerNorm",
    "Pooler-Dense": "bert.pooler.dense",
    "NSP-Dense": "bert.pooler.dense",
    "NSP-Proba": "cls.seq_relationship",
    "NSP": "cls.seq_relationship",
    "MLM-Dense": "cls.predictions.transform.dense",
    "MLM-Norm": "cls.predictions.transform.LayerNorm",
    "MLM-Bias": "cls.predictions",
    "MLM-Sim": "cls.predictions",
}
ATTENTION = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
)
# Block of an encoder's layer -> (its matrices, in the order in which they are made; its LayerNorm).
KERAS_BLOCKS = {
    "MultiHeadSelfAttention": (ATTENTION, "attention.output.LayerNorm"),
    "FeedForward": (("intermediate.dense", "output.dense"), "output.LayerNorm"),
}
KERAS_BLOCK = re.compile(
    r"(?:^|/)(Transformer|Encoder)-(\d+)-(MultiHeadSelfAttention|FeedForward)(-Norm)?(?:_\d+)?/(.+)"
)
KERAS_LAYER = re.compile(rf"(?:^|/)({'|'.join(KERAS_LAYERS)})(?:_\d+)?/(\w+)$")
GARDEN_LAYERS = {
    "word_embeddings": "bert.embeddings.word_embeddings",
    "type_embeddings": "bert.embeddings.token_type_embeddings",
    "position_embedding": "bert.embeddings.position_embeddings",
    "embeddings/layer_norm": "bert.embeddings.LayerNorm",
    "pooler_transform": "bert.pooler.dense",
    "cls/predictions/transform/dense": "cls.predictions.transform.dense",
    "cls/predictions/transform/LayerNorm": "cls.predictions.transform.LayerNorm",
    "cls/predictions/output_bias": "cls.predictions",
    # A head that has a pooler of its own does not read the encoder's.
    "next_sentence/pooler_dense": "bert.pooler.dense",
    "next_sentence/logits": "cls.seq_relationship",
    "sentence_prediction/pooler_dense": "bert.pooler.dense",
    "sentence_prediction/logits": "classifier",
}
GARDEN_BLOCKS = {
    "self_attention/query": ATTENTION[0],
    "self_attention/key": ATTENTION[1],
    "self_attention/value": ATTENTION[2],
    "self_attention/attention_output": ATTENTION[3],
    "self_attention_layer_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "output_layer_norm": "output.LayerNorm",
}
GARDEN_BLOCK = re.compile(rf"(?:^|/)transformer/layer_(\d+)/({'|'.join(GARDEN_BLOCKS)})/(\w+)$")
GARDEN_LAYER = re.compile(rf"(?:^|/)({'|'.join(GARDEN_LAYERS)})/(\w+)$")


# ----------------------------------------------------------------------------------------- names


def program_of(names: Iterable[str]) -> Program | None:
    """The program whose BERT has variables of these names; None for any other model."""
    names = list(names)
    for program in PROGRAMS:
        if any(re.search(program.known_by, name) for name in names):
            return program
    return None


def renamed(program: Program, names: Iterable[str], where: Path) -> dict[str, str]:
    """A variable's name -> its name in PyTorch, for every name in `names` that BERT has.

    UserError when two variables would have the same name, as in a file of two models.
    """
    names = list(names)
    if program == TRANSFORMERS:
        found = _transformers(names)
    elif program == GARDEN:
        found = _garden(names)
    else:
        found = _keras(names)
    origin: dict[str, str] = {}
    for name, ours in found.items():
        if ours in origin:
            raise UserError(
                f"{where} holds two variables for {ours}: {origin[ours]} and {name}; save the "
                "weights of one model only"
            )
        origin[ours] = name
    return found


def _transformers(names: list[str]) -> dict[str, str]:
    """`tf_bert_for_pre_training/mlm___cls/predictions/transform/dense/kernel`, and the like.

    The first part is the model, `a___b` is called b, and `layer_._0` is layer 0.
    """
    words = next(name for name in names if re.search(TRANSFORMERS.known_by, name))
    scope = words.removesuffix("bert/embeddings/word_embeddings/weight")
    found = {}
    for name in names:
        if not name.startswith(scope):
            continue
        plain = re.sub(r"(^|/)[^/]*___", r"\1", name.removeprefix(scope)).replace("_._", "/")
        *parts, last = plain.split("/")
        found[name] = ".".join([*parts, PARTS.get(last, last)])
    return found


def _keras(names: list[str]) -> dict[str, str]:
    """bert4keras and keras-bert."""
    found = {}
    inner: dict[tuple[str | Any, ...], set[int]] = {}
    matches = {name: match for name in names if (match := KERAS_BLOCK.search(name))}
    # bert4keras calls the matrices of a block dense_7 and so on, counted as they are made.
    for match in matches.values():
        if numbered := re.fullmatch(r"dense(?:_(\d+))?/\w+", match[5]):
            inner.setdefault(match.group(1, 2, 3), set()).add(int(numbered[1] or 0))
    for name in names:
        if match := matches.get(name):
            numbers = sorted(inner.get(match.group(1, 2, 3), ()))
            ours = _in_block(match, numbers)
        else:
            layer = KERAS_LAYER.search(name)
            ours = _joined(KERAS_LAYERS[layer[1]], layer[2]) if layer else None
        if ours is not None:
            found[name] = ours
    return found


def _in_block(match: re.Match[str], numbers: list[int]) -> str | None:
    """The name in PyTorch of a variable in a block; `numbers`: those of the block's matrices."""
    kind, number, block, is_norm, rest = match.groups()
    matrices, norm = KERAS_BLOCKS[block]
    layer = f"bert.encoder.layer.{int(number) - (kind == 'Encoder')}"
    if is_norm:
        return _joined(f"{layer}.{norm}", rest)
    if numbered := re.fullmatch(r"dense(?:_(\d+))?/(\w+)", rest):
        if len(numbers) != len(matrices):
            return None  # another network, such as one with gated layers
        return _joined(f"{layer}.{matrices[numbers.index(int(numbered[1] or 0))]}", numbered[2])
    if lettered := re.search(r"_([Wb])([qkvo]|[12])(?:_\d+)?$", rest):
        letters = "12" if block == "FeedForward" else "qkvo"
        if lettered[2] not in letters:
            return None
        part = "kernel" if lettered[1] == "W" else "bias"
        return _joined(f"{layer}.{matrices[letters.index(lettered[2])]}", part)
    return None


def _garden(names: list[str]) -> dict[str, str]:
    found = {}
    has_own_pooler = any("/pooler_dense/" in name for name in names)
    for name in names:
        ours = None
        if block := GARDEN_BLOCK.search(name):
            ours = _joined(f"bert.encoder.layer.{block[1]}.{GARDEN_BLOCKS[block[2]]}", block[3])
        elif layer := GARDEN_LAYER.search(name):
            if not (has_own_pooler and layer[1] == "pooler_transform"):
                ours = _joined(GARDEN_LAYERS[layer[1]], layer[2])
        if ours is not None:
            found[name] = ours
    return found


def _joined(layer: str, part: str) -> str | None:
    return f"{layer}.{PARTS[part]}" if part in PARTS else None


def in_our_shape(ours: str, array: np.ndarray) -> torch.Tensor:
    """A variable as the tensor `ours`: matrices [out, in], and the heads of attention joined.

    Model Garden keeps them apart: query [hidden, heads, size], output [heads, size, hidden].
    """
    array = np.asarray(array, dtype=np.float32)
    if array.ndim == 3:
        is_output = ours.endswith("attention.output.dense.weight")
        shape = (-1, array.shape[2]) if is_output else (array.shape[0], -1)
        array = array.reshape(shape)
    elif array.ndim == 2 and ours.endswith("bias"):
        array = array.reshape(-1)
    if array.ndim == 2 and "_embeddings." not in ours:
        array = array.T
    return torch.from_numpy(np.ascontiguousarray(array))


def some(names: Iterable[str]) -> str:
    """A few of the names, for a message about a model that is none that is known."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# ----------------------------------------------------------------------------------------- files


def read(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of an .h5 file in PyTorch's names; variables of no BERT keep their own names."""
    arrays = _contents(path, lambda variable: np.asarray(variable, dtype=np.float32))
    names = renamed(_program(path, arrays), arrays, path)
    return {
        names.get(name, name): in_our_shape(names.get(name, name), arrays[name]) for name in arrays
    }


def program_of_file(path: Path) -> Program:
    """The program that wrote an .h5 file; no array is read."""
    return _program(path, _contents(path, lambda variable: variable.shape))


def _program(path: Path, names: Mapping[str, Any]) -> Program:
    program = program_of(names)
    if program is None:
        raise UserError(
            f"{path} holds variables that are named otherwise than in the BERTs of transformers, "
            f"bert4keras, keras-bert and TensorFlow's Model Garden: {some(names)}; load it in the "
            "program that wrote it, and save the BERT alone with one of these"
        )
    return program


def _contents(path: Path, take: Any) -> dict[str, Any]:
    """Variable's name -> what `take` makes of its dataset, for each variable of an .h5 file."""
    refuse_placeholder(path)
    try:
        import h5py
    except ImportError:
        raise UserError(f"{path} needs h5py; run: pip install 'clue_ds[keras]'") from None
    try:
        with h5py.File(path, "r") as file:
            # A whole model (model.save) holds its weights in a group.
            root = file["model_weights"] if "model_weights" in file else file
            if "layer_names" not in root.attrs:
                holds = some(map(str, root))
                raise UserError(
                    f"{path} is not a file of Keras 2, whose attribute layer_names says what is in "
                    f"it (this one holds {holds}). Keras 3 counts variables and does not name "
                    "them: load the file in the program that wrote it, and save its BERT with "
                    "save_weights_as_checkpoint of bert4keras or save_pretrained of transformers"
                )
            found = {}
            for layer in root.attrs["layer_names"]:
                group = root[layer]
                for name in map(_text, group.attrs["weight_names"]):
                    found[name.removesuffix(":0")] = take(group[name])
            return found
    except UserError:
        raise
    # h5py raises whatever the damage that it meets leads to.
    except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(
            f"{path} can't be read as the weights of a Keras model ({first_line(error)}); copy or "
            "download it again"
        ) from None


def _text(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)
