"""State dicts: read from a Hugging Face directory, tied, padded, and loaded into a model.

A state dict here is {name: fp32 CPU tensor} with the names of transformers' BertForPreTraining; the
tied entries are present and share storage. Guarantees: only plain tensors are unpickled; every
shape is compared with config.json before the weights are loaded; missing weights are reported,
never filled silently.

Rejected: transformers' own loader (it creates missing weights with only a log line, and importing
it takes seconds).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from clue_ds.errors import UserError
from clue_ds.model import weight_files
from clue_ds.model.bert import BertForPreTraining
from clue_ds.model.config_json import model_config as model_config
from clue_ds.model.config_json import read_config as read_config
from clue_ds.model.config_json import read_config_json as read_config_json
from clue_ds.model.weight_files import WEIGHT_FILES as WEIGHT_FILES
from clue_ds.model.weight_files import WORD_EMBEDDINGS, StateDict
from clue_ds.presets import ModelConfig

SEGMENT_EMBEDDINGS = "bert.embeddings.token_type_embeddings.weight"
DECODER_WEIGHT = "cls.predictions.decoder.weight"
DECODER_BIAS = "cls.predictions.decoder.bias"
PREDICTION_BIAS = "cls.predictions.bias"
POOLER_WEIGHT = "bert.pooler.dense.weight"
NEXT_SENTENCE_WEIGHT = "cls.seq_relationship.weight"
# Of a fine-tuned model; BertForPreTraining has none.
CLASSIFIER_WEIGHT = "classifier.weight"
CLASSIFIER_BIAS = "classifier.bias"
QA_WEIGHT = "qa_outputs.weight"
QA_BIAS = "qa_outputs.bias"
# How the names of fine-tuned heads begin.
POINTER_HEAD = ("entity_pointer.", "entity_types.")
TASK_HEADS = ("classifier.", "qa_outputs.", *POINTER_HEAD)
VOCAB_ROWS = (WORD_EMBEDDINGS, DECODER_WEIGHT, DECODER_BIAS, PREDICTION_BIAS)
# Entry -> the entry that it is tied to; files need only the second.
TIED = {DECODER_WEIGHT: WORD_EMBEDDINGS, DECODER_BIAS: PREDICTION_BIAS}

# Layers that a model has completely or not at all: what they are called -> how their names begin.
HEADS = {
    "pooler": "bert.pooler.",
    "MLM head": "cls.predictions.",
    "NSP head": "cls.seq_relationship.",
}
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


def read_pretrained(directory: str | Path) -> tuple[ModelConfig, StateDict]:
    """Config and every weight of a Hugging Face directory (safetensors or .bin, sharded or not).

    Old names (gamma, beta, no `bert.`) and those of wrapped models are changed to today's, and
    `position_ids` is dropped; heads that the files lack are absent. UserError names the file and
    what is wrong.
    """
    directory = Path(directory)
    config = read_config(directory)
    state, _ = read_weights(directory)
    check_shapes(config, state, directory)
    return config, tie(state, directory)


def read_weights(directory: Path) -> tuple[StateDict, tuple[str, ...]]:
    """The weights of a Hugging Face directory under today's names, and notes on the names.

    Only the rank of the word embeddings is checked; see `check_shapes`.
    """
    state, notes = weight_files.read(directory)
    if state[WORD_EMBEDDINGS].dim() != 2:
        raise UserError(
            f"{directory}: {WORD_EMBEDDINGS} has the shape {tuple(state[WORD_EMBEDDINGS].shape)} "
            "and is no matrix; give the directory of a BERT"
        )
    return state, notes


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
    """UserError unless `state` holds every tensor of `config`'s encoder in the right shape.

    Tensors that BertForPreTraining doesn't have are not looked at, all others must be finite.
    """
    num_rows = state[WORD_EMBEDDINGS].shape[0]
    if num_rows != config.vocab_size:
        raise UserError(
            f"{where}: the weights have {num_rows:,} words but config.json says vocab_size "
            f"{config.vocab_size:,}; set it to the number of lines of vocab.txt that was trained"
        )
    if config.pad_token_id >= num_rows:
        raise UserError(
            f"{where}: pad_token_id {config.pad_token_id} is not an id of the {num_rows:,} words; "
            "use the config that belongs to the weights"
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
    check_classifier(config, state, where)
    heads = {n: t for n, t in state.items() if n.startswith(TASK_HEADS)}
    check_finite(heads | {n: t for n, t in state.items() if n in expected}, where)


def check_classifier(config: ModelConfig, state: StateDict, where: str | Path) -> None:
    """UserError unless a classifier in `state`, if there is one, is one of `config`'s network."""
    weight, bias = state.get(CLASSIFIER_WEIGHT), state.get(CLASSIFIER_BIAS)
    if weight is not None and (weight.dim() != 2 or weight.shape[1] != config.hidden_size):
        raise UserError(
            f"{where}: {CLASSIFIER_WEIGHT} is {tuple(weight.shape)}, but hidden_size is "
            f"{config.hidden_size}; use the config that belongs to the weights"
        )
    if weight is not None and bias is not None and bias.shape != weight.shape[:1]:
        raise UserError(
            f"{where}: {CLASSIFIER_BIAS} is {tuple(bias.shape)} for {len(weight)} classes; copy or "
            "download the weights again"
        )


def check_finite(state: StateDict, where: str | Path) -> None:
    """UserError that names the tensors with a NaN, an infinity, or whole numbers for weights."""
    stored = [f"{n} ({t.dtype})" for n, t in state.items() if not t.is_floating_point()]
    if stored:
        raise UserError(
            f"{where}: {len(stored)} tensors hold no fractions, such as {stored[0]}; quantized "
            "weights are not read, so give the fp32, fp16 or bf16 ones"
        )
    bad = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise UserError(
            f"{where}: {len(bad)} tensors hold NaN or infinite weights: {', '.join(bad[:5])}"
            f"{', ...' if len(bad) > 5 else ''}; the training or the conversion that wrote them "
            "failed, so use an earlier checkpoint or download the model again"
        )


def lacking(config: ModelConfig, state: StateDict) -> dict[str, list[str]]:
    """What of HEADS `state` lacks: name of the layers -> all tensors of them that are missing."""
    names = [name for name in expected_shapes(config) if name not in state and name not in TIED]
    by_head = {head: [n for n in names if n.startswith(begin)] for head, begin in HEADS.items()}
    return {head: missing for head, missing in by_head.items() if missing}


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
