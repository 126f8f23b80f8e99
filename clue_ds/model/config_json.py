"""config.json of a BERT, read and checked.

Guarantees: every value that is used has its type and a size that a network can have, so that a
damaged or hostile config is one message that names the key and never an error from inside torch.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from clue_ds.errors import UserError
from clue_ds.files import read_json
from clue_ds.model import finetuned
from clue_ds.presets import ModelConfig

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_new", "gelu_pytorch_tanh": "gelu_new"}
# The largest values that are read. The shapes of every tensor are computed from them, so a number
# beyond all networks must not reach torch.
MOST = 1 << 24
MOST_LAYERS = 1024


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
    if not path.is_file() and not path.is_symlink():
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
    known = {f.name: values[f.name] for f in fields if values.get(f.name) is not None}
    missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in known]
    if missing:
        raise UserError(
            f"{path} lacks {', '.join(missing)}: it is not a BERT config; use the one that was "
            "published with the weights"
        )
    activation = known.get("hidden_act", "gelu")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise UserError(f"{path}: hidden_act {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    known["hidden_act"] = ACTIVATIONS[activation]
    for field in fields:
        if field.name in known and field.type != "str":
            _check_number(path, field.name, known[field.name], field.type == "int")
    if known["hidden_size"] % known["num_attention_heads"]:
        raise UserError(
            f"{path}: hidden_size {known['hidden_size']} is not divisible by num_attention_heads "
            f"{known['num_attention_heads']}; use the config that belongs to the weights"
        )
    finetuned.check_types(values, path)
    return ModelConfig(**known)


def _check_number(path: Path, key: str, value: Any, is_integer: bool) -> None:
    """UserError unless `value` is a number in the range of such a key."""
    if is_integer:
        lowest = 0 if key == "pad_token_id" else 1
        highest = MOST_LAYERS if key == "num_hidden_layers" else MOST
        fits = type(value) is int and lowest <= value <= highest
        needed = f"an integer from {lowest} to {highest:,}"
    else:
        limit = 1.0 if key.endswith("_prob") else MOST
        fits = type(value) in (int, float) and 0 <= value <= limit
        needed = f"a number from 0 to {limit:,}"
    if not fits:
        raise UserError(
            f"{path}: {key} is {value!r:.60}; it must be {needed}. Use the config that belongs to "
            "the weights"
        )
