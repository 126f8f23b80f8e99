"""The layout of UER and TencentPretrain, read and written without them.

    model.bin  config.json  vocab.txt

One table of names serves both directions; UER's names of before 2022 are read too. UER counts
segments from 1 and keeps row 0 for padding, so that its table of segments has one row more.

What this layout can't say: UER's LayerNorm divides by the unbiased standard deviation plus 1e-6,
where BERT's divides by the root of the variance plus its epsilon, so that answers there differ by
about 1e-3. Its "gelu" is the erf form, and "gelu_fast" the tanh form.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from clue_ds.errors import UserError
from clue_ds.export.legacy import torch_file
from clue_ds.export.publish import (
    check_state,
    copy_vocab,
    read_tokens,
    staged,
    write_model_json,
)
from clue_ds.files import read_json
from clue_ds.model import weight_files
from clue_ds.model.finetuned import FineTuned
from clue_ds.model.weights import (
    DECODER_BIAS,
    DECODER_WEIGHT,
    NEXT_SENTENCE_WEIGHT,
    PREDICTION_BIAS,
    SEGMENT_EMBEDDINGS,
    TASK_HEADS,
    WORD_EMBEDDINGS,
    StateDict,
    model_config,
)
from clue_ds.presets import ModelConfig

FILE, CONFIG_FILE = "model.bin", "config.json"
NOTE = (
    "UER's LayerNorm divides by another standard deviation than BERT's, so the model's answers "
    "differ by about 1e-3 from those that UER computes"
)
# UER's config keys -> those of config.json.
CONFIG_KEYS = {
    "hidden_size": "hidden_size",
    "feedforward_size": "intermediate_size",
    "heads_num": "num_attention_heads",
    "layers_num": "num_hidden_layers",
    "max_seq_length": "max_position_embeddings",
}
ACTIVATIONS = {"gelu": "gelu", "gelu_fast": "gelu_new"}
# How names began before 2022 -> how they begin today.
OLD_NAMES = {
    "embedding.word_embedding.": "embedding.word.embedding.",
    "embedding.position_embedding.": "embedding.pos.embedding.",
    "embedding.segment_embedding.": "embedding.seg.embedding.",
    "target.mlm_linear_": "target.mlm.linear_",
    "target.layer_norm.": "target.mlm.layer_norm.",
    "target.nsp_linear_": "target.sp.linear_",
    "target.sp_linear_": "target.sp.linear_",
}
# The parts of a layer: UER's name -> ours.
LAYER = {
    "self_attn.linear_layers.0": "attention.self.query",
    "self_attn.linear_layers.1": "attention.self.key",
    "self_attn.linear_layers.2": "attention.self.value",
    "self_attn.final_linear": "attention.output.dense",
    "layer_norm_1": "attention.output.LayerNorm",
    "feed_forward.linear_1": "intermediate.dense",
    "feed_forward.linear_2": "output.dense",
    "layer_norm_2": "output.LayerNorm",
}
HEADS = {
    "target.sp.linear_1": "bert.pooler.dense",
    "target.sp.linear_2": "cls.seq_relationship",
    "target.mlm.linear_1": "cls.predictions.transform.dense",
    "target.mlm.layer_norm": "cls.predictions.transform.LayerNorm",
}
NORM = {"gamma": "weight", "beta": "bias"}
PLAIN = {"weight": "weight", "bias": "bias"}


def name_table(num_layers: int) -> dict[str, str]:
    """UER's name -> ours, for every tensor that a BERT may have there."""
    table = {
        "embedding.word.embedding.weight": WORD_EMBEDDINGS,
        "embedding.pos.embedding.weight": "bert.embeddings.position_embeddings.weight",
        "embedding.seg.embedding.weight": SEGMENT_EMBEDDINGS,
        "target.mlm.linear_2.weight": DECODER_WEIGHT,
        "target.mlm.linear_2.bias": PREDICTION_BIAS,
    }
    parts = {"embedding.layer_norm": "bert.embeddings.LayerNorm", **HEADS}
    for number in range(num_layers):
        here, there = f"encoder.transformer.{number}", f"bert.encoder.layer.{number}"
        parts |= {f"{here}.{theirs}": f"{there}.{ours}" for theirs, ours in LAYER.items()}
    for theirs, ours in parts.items():
        ends = NORM if "layer_norm" in theirs else PLAIN
        table |= {f"{theirs}.{one}": f"{ours}.{other}" for one, other in ends.items()}
    return table


def write(
    config: ModelConfig,
    state: StateDict,
    vocab_file: str | Path,
    directory: str | Path,
    lower_case: bool = True,
    force: bool = False,
    finetuned: FineTuned | None = None,
) -> Path:
    """Write the directory; arguments, guarantees and errors are those of huggingface.write.

    Fine-tuned heads are refused: a classifier of UER has two layers, and each task its own program.
    """
    directory = Path(directory)
    read_tokens(vocab_file, config.vocab_size)
    check_state(config, state, finetuned)
    if any(name.startswith(TASK_HEADS) for name in state):
        raise UserError("the layout uer has no place for a fine-tuned head; export it with --to hf")
    tensors: StateDict = {}
    for theirs, ours in name_table(config.num_hidden_layers).items():
        if ours in state:
            tensor = state[ours].detach().float()
            if ours == SEGMENT_EMBEDDINGS:
                tensor = torch.cat([torch.zeros(1, config.hidden_size), tensor])
            tensors[theirs] = tensor.contiguous()
        elif ours == DECODER_WEIGHT and PREDICTION_BIAS in state:
            tensors[theirs] = tensors["embedding.word.embedding.weight"]
    with staged(directory, force) as place:
        place.mkdir()
        torch_file.save(tensors, place / FILE)
        write_model_json(place / CONFIG_FILE, _config_json(config, state))
        copy_vocab(vocab_file, place)
    return directory


def _config_json(config: ModelConfig, state: StateDict) -> dict[str, Any]:
    targets = ["mlm"] if PREDICTION_BIAS in state else []
    targets += ["sp"] if NEXT_SENTENCE_WEIGHT in state else []
    activation = next(name for name, ours in ACTIVATIONS.items() if ours == config.hidden_act)
    return {
        **{theirs: getattr(config, ours) for theirs, ours in CONFIG_KEYS.items()},
        "emb_size": config.hidden_size,
        "hidden_act": activation,
        "dropout": config.hidden_dropout_prob,
        "data_processor": "bert",
        "embedding": ["word", "pos", "seg"],
        "encoder": "transformer",
        "mask": "fully_visible",
        "target": targets,
    }


def find_config(directory: Path) -> Path | None:
    """The config in UER's form in a directory, if there is one."""
    for path in sorted(directory.glob("*config*.json")):
        if path.is_file() and b'"heads_num"' in path.read_bytes()[:10_000]:
            return path
    return None


def read_config(directory: Path) -> dict[str, Any]:
    """The config in the keys of config.json; UserError when it describes no BERT."""
    path = find_config(directory)
    assert path is not None
    values = read_json(path)
    if values.get("encoder", "transformer") != "transformer" or values.get("layernorm_positioning"):
        raise UserError(
            f"{path} describes no BERT: its encoder or the place of its LayerNorm is another one; "
            "give a BERT of UER"
        )
    activation = values.get("hidden_act", "gelu")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        names = ", ".join(ACTIVATIONS)
        raise UserError(f"{path}: hidden_act {activation!r:.60} is not one of {names}")
    known = {ours: values[theirs] for theirs, ours in CONFIG_KEYS.items() if theirs in values}
    if "dropout" in values:
        dropouts = ("hidden_dropout_prob", "attention_probs_dropout_prob")
        known |= dict.fromkeys(dropouts, values["dropout"])
    return known | {"model_type": "bert", "hidden_act": ACTIVATIONS[activation]}


def read(directory: Path) -> tuple[ModelConfig, StateDict, list[str]]:
    """(config, state dict, names of tensors that were left out) of a directory in this layout."""
    known = read_config(directory)
    raw = {
        _today(name): tensor for name, tensor in weight_files.read_file(_file(directory)).items()
    }
    found = [re.match(r"encoder\.transformer\.(\d+)\.", name) for name in raw]
    num_layers = 1 + max((int(match[1]) for match in found if match), default=-1)
    if num_layers != known.get("num_hidden_layers"):
        raise UserError(
            f"{_file(directory)} has {num_layers} layers, but its config says layers_num "
            f"{known.get('num_hidden_layers')}; use the config that belongs to the weights"
        )
    table, words = name_table(num_layers), "embedding.word.embedding.weight"
    if words not in raw or raw[words].dim() != 2:
        raise UserError(f"{_file(directory)} has no matrix {words}; give a BERT of UER")
    state = {ours: raw[theirs].float() for theirs, ours in table.items() if theirs in raw}
    if SEGMENT_EMBEDDINGS in state:
        state[SEGMENT_EMBEDDINGS] = state[SEGMENT_EMBEDDINGS][1:].contiguous()
    if DECODER_WEIGHT in state and PREDICTION_BIAS in state:
        state[DECODER_BIAS] = state[PREDICTION_BIAS]
    known |= {
        "vocab_size": len(raw[words]),
        "type_vocab_size": len(state.get(SEGMENT_EMBEDDINGS, ())),
    }
    left_out = [name for name in raw if name not in table]
    return model_config(known, find_config(directory) or directory), state, left_out


def _today(name: str) -> str:
    for old, new in OLD_NAMES.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _file(directory: Path) -> Path:
    found = sorted(path for path in directory.glob("*.bin") if path.is_file())
    if len(found) != 1:
        raise UserError(
            f"{directory} holds {len(found)} .bin files beside a config of UER; leave the one that "
            "belongs to it"
        )
    return found[0]
