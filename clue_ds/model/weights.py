"""State dicts: read from a Hugging Face directory, tied, padded, and loaded into a model.

A state dict here is {name: fp32 CPU tensor} with the names of transformers' BertForPreTraining; the
tied entries are present and share storage. Guarantees: only plain tensors are unpickled; every
shape is compared with config.json before the weights are loaded; missing weights are reported,
never filled silently.

Rejected: transformers' own loader (it creates missing weights with only a log line, and importing
it takes seconds).
"""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from clue_ds.errors import UserError
from clue_ds.files import read_json
from clue_ds.model.bert import BertForPreTraining
from clue_ds.presets import ModelConfig

StateDict = dict[str, Tensor]

WORD_EMBEDDINGS = "bert.embeddings.word_embeddings.weight"
DECODER_WEIGHT = "cls.predictions.decoder.weight"
DECODER_BIAS = "cls.predictions.decoder.bias"
PREDICTION_BIAS = "cls.predictions.bias"
POOLER_WEIGHT = "bert.pooler.dense.weight"
NEXT_SENTENCE_WEIGHT = "cls.seq_relationship.weight"
# Of a fine-tuned model; BertForPreTraining has none.
CLASSIFIER_WEIGHT = "classifier.weight"
CLASSIFIER_BIAS = "classifier.bias"
VOCAB_ROWS = (WORD_EMBEDDINGS, DECODER_WEIGHT, DECODER_BIAS, PREDICTION_BIAS)
# Entry -> the entry that it is tied to; files need only the second.
TIED = {DECODER_WEIGHT: WORD_EMBEDDINGS, DECODER_BIAS: PREDICTION_BIAS}

OLD_SUFFIXES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # or either name + .index.json
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_new", "gelu_pytorch_tanh": "gelu_new"}
# Two configs that differ in one of these are different networks; dropout may differ between runs.
SHAPE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "max_position_embeddings",
    "type_vocab_size",
    "layer_norm_eps",
)


def read_config(directory: str | Path) -> ModelConfig:
    """The ModelConfig of a Hugging Face directory; UserError when it is not a BERT."""
    return model_config(read_config_json(directory), Path(directory) / "config.json")


def read_config_json(directory: str | Path) -> dict[str, Any]:
    """The content of config.json; UserError when `directory` has none or it is not JSON."""
    path = Path(directory) / "config.json"
    if not Path(directory).is_dir():
        raise UserError(
            f"{directory} is not a directory; give a model directory or a run directory"
        )
    if not path.is_file():
        raise UserError(
            f"{directory} is not a model directory: it has no config.json; give a Hugging Face "
            "directory, or a run directory with a checkpoint"
        )
    return read_json(path)


def model_config(values: dict[str, Any], path: Path) -> ModelConfig:
    """The ModelConfig that the keys of a Hugging Face config.json (at `path`) describe."""
    model_type = values.get("model_type", "bert")
    if model_type != "bert":
        raise UserError(
            f"{path} describes a {model_type} model; give a BERT, the only supported model_type"
        )
    if values.get("position_embedding_type", "absolute") != "absolute":
        raise UserError(
            f"{path}: only absolute position embeddings are supported; give a model with those"
        )
    fields = dataclasses.fields(ModelConfig)
    missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in values]
    if missing:
        raise UserError(
            f"{path} lacks {', '.join(missing)}: it is not a BERT config; use the one that was "
            "published with the weights"
        )
    known = {f.name: values[f.name] for f in fields if values.get(f.name) is not None}
    activation = known.get("hidden_act", "gelu")
    if activation not in ACTIVATIONS:
        raise UserError(f"{path}: hidden_act {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    known["hidden_act"] = ACTIVATIONS[activation]
    return ModelConfig(**known)


def read_pretrained(directory: str | Path) -> tuple[ModelConfig, StateDict]:
    """Config and every weight of a Hugging Face directory (safetensors or .bin, sharded or not).

    Old names (gamma, beta, `module.`, no `bert.`) are changed to today's, and `position_ids` is
    dropped; heads that the files lack are absent. UserError names the file and what is wrong.
    """
    directory = Path(directory)
    config = read_config(directory)
    state = read_weights(directory)
    check_shapes(config, state, directory)
    return config, tie(state, directory)


def read_weights(directory: Path) -> StateDict:
    """The weights of a Hugging Face directory under today's names; shapes are not compared yet."""
    state = canonical(_read_files(directory))
    if WORD_EMBEDDINGS not in state:
        raise UserError(
            f"{directory}: the weights hold no {WORD_EMBEDDINGS}, so they are not a BERT encoder; "
            "give the directory of a BERT"
        )
    return state


def _read_files(directory: Path) -> StateDict:
    for name in WEIGHT_FILES:
        index = directory / f"{name}.index.json"
        if (directory / name).is_file():
            return _read_file(directory / name)
        if index.is_file():
            try:
                shards = sorted(set(read_json(index)["weight_map"].values()))
            except (KeyError, AttributeError):
                raise UserError(
                    f"{index} names no weight files under weight_map; copy or download it again"
                ) from None
            state: StateDict = {}
            for shard in shards:
                if not (directory / shard).is_file():
                    raise UserError(f"{index} names {shard}, which is missing; copy it again")
                state |= _read_file(directory / shard)
            return state
    raise UserError(
        f"{directory} has a config.json but no weights; copy {' or '.join(WEIGHT_FILES)} into it"
    )


def _read_file(path: Path) -> StateDict:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, RuntimeError, EOFError) as error:
        raise UserError(
            f"{path} ({path.stat().st_size:,} bytes) can't be read because it is truncated or "
            f"damaged ({str(error).splitlines()[0]}); copy or download it again"
        ) from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds Python objects other than tensors, which are never loaded; "
            "ask its author for model.safetensors"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(
            f"{path} is not a state dict of tensors; ask its author for model.safetensors"
        )
    return state


def canonical(state: StateDict) -> StateDict:
    """A state dict written by an old version or a wrapper, under today's names and in fp32."""
    result: StateDict = {}
    for name, tensor in state.items():
        name = name.removeprefix("module.")
        if name.endswith("position_ids"):
            continue
        for old, new in OLD_SUFFIXES.items():
            if name.endswith(old):
                name = name.removesuffix(old) + new
        if name.split(".")[0] in ("embeddings", "encoder", "pooler"):
            name = f"bert.{name}"
        result[name] = tensor.float()
    return result


def tie(state: StateDict, where: str | Path) -> StateDict:
    """Make the tied entries share storage, and add those that are missing.

    A file without an MLM head gets none. An untied decoder weight is kept; `load_into` refuses it.
    UserError when the two entries of the decoder's bias differ.
    """
    if PREDICTION_BIAS not in state and DECODER_BIAS in state:
        state[PREDICTION_BIAS] = state[DECODER_BIAS]
    if PREDICTION_BIAS not in state:
        return state
    for copy, original in TIED.items():
        if copy not in state or is_tied(state, copy):
            state[copy] = state[original]
        elif copy == DECODER_BIAS:
            raise UserError(
                f"{where}: {copy} differs from {original}; versions of transformers disagree on "
                "which one is used, so delete the wrong one"
            )
    return state


def is_tied(state: StateDict, copy: str) -> bool:
    """Whether the entry `copy` (a key of TIED) is absent or equals the one that it is tied to."""
    if copy not in state or TIED[copy] not in state:
        return True
    one, other = state[copy], state[TIED[copy]]
    return one.data_ptr() == other.data_ptr() or torch.equal(one, other)


def check_shapes(config: ModelConfig, state: StateDict, where: Path) -> None:
    """UserError unless `state` holds every tensor of `config`'s encoder in the right shape."""
    num_rows = state[WORD_EMBEDDINGS].shape[0]
    if num_rows != config.vocab_size:
        raise UserError(
            f"{where}: the weights have {num_rows:,} words but config.json says vocab_size "
            f"{config.vocab_size:,}; set it to the number of lines of vocab.txt that was trained"
        )
    expected = expected_shapes(config)
    for name, tensor in state.items():
        if name in expected and tensor.shape != expected[name]:
            raise UserError(
                f"{where}: {name} is {tuple(tensor.shape)}, but config.json describes "
                f"{tuple(expected[name])}; use the config that belongs to the weights"
            )
    missing = [n for n in expected if _in_encoder(n) and n not in state]
    if missing:
        raise UserError(
            f"{where}: the weights lack {len(missing)} tensors of the encoder that config.json "
            f"describes, such as {missing[0]}; correct num_hidden_layers, or download them again"
        )


def expected_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Name -> shape of every entry of BertForPreTraining's state dict."""
    with torch.device("meta"):
        model = BertForPreTraining(config)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _in_encoder(name: str) -> bool:
    return name.startswith(("bert.embeddings.", "bert.encoder."))


def pad_vocab_rows(state: StateDict, num_rows: int) -> StateDict:
    """The state dict with zero rows added, up to `num_rows` words (for `padded_vocab_size`)."""
    return _resize_vocab_rows(state, num_rows)


def trim_vocab(state: StateDict, vocab_size: int) -> StateDict:
    """The state dict without padding rows: the first `vocab_size` words."""
    return _resize_vocab_rows(state, vocab_size)


def _resize_vocab_rows(state: StateDict, num_rows: int) -> StateDict:
    result = dict(state)
    for name in VOCAB_ROWS:
        if name in state:
            old = state[name]
            result[name] = old.new_zeros(num_rows, *old.shape[1:])
            num_kept = min(num_rows, len(old))
            result[name][:num_kept] = old[:num_kept]
    for copy, original in TIED.items():
        if copy in state and original in state and is_tied(state, copy):
            result[copy] = result[original]
    return result


def check_same_shape(config: ModelConfig, other: ModelConfig, where: str | Path) -> None:
    """UserError listing every field in which `other`, the network in `where`, differs."""
    differences = [
        f"{name} is {getattr(other, name)} there and {getattr(config, name)} here"
        for name in SHAPE_FIELDS
        if getattr(config, name) != getattr(other, name)
    ]
    if differences:
        raise UserError(
            f"{where} holds another network: {'; '.join(differences)}. Make the two agree, or give "
            "another model"
        )


def load_into(
    model: nn.Module, config: ModelConfig, state: StateDict, where: str | Path
) -> list[str]:
    """Load a network read from `where` into a BertForPreTraining or task model, in place.

    The model keeps its vocabulary padding (those rows become zeros). Returns the names that `state`
    lacks; these keep the model's own weights. UserError when the networks differ.
    """
    here = model.config
    assert isinstance(here, ModelConfig)
    check_same_shape(here, config, where)
    if not is_tied(state, DECODER_WEIGHT):
        raise UserError(
            f"{where}: {DECODER_WEIGHT} differs from {WORD_EMBEDDINGS}; training and "
            "fine-tuning take tied decoders only (export and import convert the others too)"
        )
    own = model.state_dict()
    num_rows = len(own[WORD_EMBEDDINGS])
    if num_rows != config.vocab_size:
        state = pad_vocab_rows(state, num_rows)
    model.load_state_dict({n: t for n, t in state.items() if n in own}, strict=False)
    return [name for name in own if name not in state]


def load_pretrained(model: nn.Module, directory: str | Path) -> list[str]:
    """`load_into` from a Hugging Face directory; only heads can be among the names returned."""
    config, state = read_pretrained(directory)
    return load_into(model, config, state, directory)
