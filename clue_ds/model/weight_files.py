"""model.safetensors and pytorch_model.bin, whole or sharded, or tf_model.h5, in today's names.

Guarantees: only plain tensors are unpickled; a file that cannot be read is one message that says
whether it is truncated, a placeholder of a download, or holds Python objects. A tensor that takes
more memory than its bytes in the file (an expanded one) is refused, and an index names only files
of its own directory. The prefixes that wrappers put before names (torch.compile, DDP) are removed
and reported.
"""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from clue_ds.errors import UserError, existing_file, first_line
from clue_ds.files import read_json, refuse_placeholder
from clue_ds.model import keras_file

StateDict = dict[str, Tensor]

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # or either name + .index.json
WORD_EMBEDDINGS = "bert.embeddings.word_embeddings.weight"
OLD_SUFFIXES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
# Under what training loops save a state dict, beside their optimizer's.
STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model")
# The parts of a name that BertModel's own file has no "bert." before.
ENCODER_PARTS = ("embeddings", "encoder", "pooler")
# What is put before the names of a wrapped model: DDP, torch.compile, Lightning, a model that is
# an attribute, sentence-transformers.
WRAPPERS = ("module", "_orig_mod", "model", "auto_model", "_fsdp_wrapped_module", "0")
# The parts that wrappers of single layers put inside a name.
INNER_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# torch.save writes a zip; before torch 1.6 it wrote a pickle.
PICKLE_BEGINNINGS = (b"PK\x03\x04", b"\x80")


def read(directory: Path) -> tuple[StateDict, tuple[str, ...]]:
    """The fp32 weights under today's names, and notes on what was changed in the names.

    Shapes are not compared, and tensors of other models are among the weights. UserError when there
    is no matrix of word embeddings.
    """
    raw = _read_files(directory)
    bare = {name: _without_inner(name) for name in raw}
    prefix = _prefix(list(bare.values()), directory)
    state: StateDict = {}
    for name, tensor in raw.items():
        ours = today(bare[name].removeprefix(prefix))
        if ours.endswith("position_ids"):
            continue
        if ours in state:
            raise UserError(
                f"{directory}: two tensors are called {ours} without the prefixes of wrappers; "
                "save the state dict of one model only"
            )
        state[ours] = tensor.float() if tensor.is_floating_point() else tensor
    removed = sorted({part for name in raw for part in name.split(".")} & set(INNER_WRAPPERS))
    removed += prefix.split(".")[:-1]
    if not removed:
        return state, ()
    said = ", ".join(f"{part}." for part in removed)
    return state, (f"removed {said} from the names of the weights, which a wrapper put there",)


def today(name: str) -> str:
    """A tensor's name in BertForPreTraining, for one of an older version or of BertModel alone."""
    for old, new in OLD_SUFFIXES.items():
        if name.endswith(old):
            name = name.removesuffix(old) + new
    return f"bert.{name}" if name.split(".")[0] in ENCODER_PARTS else name


def _prefix(names: list[str], directory: Path) -> str:
    """What wrappers put before every name; found at the word embeddings, which a BERT has once."""
    tail = WORD_EMBEDDINGS.removeprefix("bert.")
    found = [name for name in names if f".{name}".endswith(f".{tail}")]
    begins = [name.removesuffix(tail).removesuffix("bert.") for name in found]
    if len(found) == 1 and set(begins[0].split(".")[:-1]) <= set(WRAPPERS):
        return begins[0]
    what = f"hold no {WORD_EMBEDDINGS}, so they are not a BERT encoder"
    if len(found) == 1:
        what += f" (its name there is {found[0]})"
    elif found:
        what = f"hold the word embeddings of {len(found)} models ({', '.join(sorted(found)[:4])})"
    raise UserError(
        f"{directory}: the weights {what}; give the directory of a BERT, or save the state dict of "
        "the BERT alone"
    )


def _without_inner(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in INNER_WRAPPERS)


def _read_files(directory: Path) -> StateDict:
    for name in WEIGHT_FILES:
        path, index = directory / name, directory / f"{name}.index.json"
        if path.is_file() or path.is_symlink():
            return read_file(path)
        if index.is_file() or index.is_symlink():
            return _read_shards(directory, index)
    if (directory / keras_file.FILE).is_file():
        return keras_file.read(directory / keras_file.FILE)
    raise UserError(
        f"{directory} has a config.json but no weights; copy {' or '.join(WEIGHT_FILES)} into it"
    )


def _read_shards(directory: Path, index: Path) -> StateDict:
    weight_map = read_json(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) and name for name in names):
        raise UserError(
            f"{index} names no weight files under weight_map; copy or download it again"
        )
    state: StateDict = {}
    for shard in sorted(set(names)):
        if shard != Path(shard).name or "\\" in shard or "\0" in shard:
            raise UserError(
                f"{index} names {shard!r}, which is not a file of its own directory; download the "
                "model again from a source you trust"
            )
        if not (directory / shard).is_file():
            raise UserError(f"{index} names {shard}, which is missing; copy it again")
        state |= read_file(directory / shard)
    return state


def read_file(path: Path) -> StateDict:
    """The tensors of one .safetensors or .bin file, under the names that it has."""
    refuse_placeholder(existing_file(path, "weights"))
    state = _safe_tensors(path) if path.suffix == ".safetensors" else _inner(_unpickled(path))
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        raise UserError(
            f"{path} is not a state dict of tensors; ask its author for model.safetensors"
        )
    for name, tensor in state.items():
        _check_dense(path, name, tensor)
    return state


def _inner(content: object) -> object:
    """The state dict in the content of a .bin, which may stand beside an optimizer's state."""
    for key in STATE_DICT_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            return content[key]
    return content


def _safe_tensors(path: Path) -> object:
    try:
        return safetensors.torch.load_file(path)
    # The library raises other types too for headers with types or sizes that torch has not.
    except Exception as error:
        raise _damaged(path, error) from None


def _unpickled(path: Path) -> object:
    with open(path, "rb") as file:
        begin = file.read(4)
    try:
        with warnings.catch_warnings():
            # torch warns of pickle protocols that its own files don't have.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not begin.startswith(PICKLE_BEGINNINGS):
            raise _damaged(path, ValueError("it does not begin as torch.save begins")) from None
        if "Unsupported" not in str(error) and "GLOBAL" not in str(error):
            raise _damaged(path, error) from None
        raise UserError(
            f"{path} holds Python objects other than tensors, which are never loaded; "
            "ask its author for model.safetensors"
        ) from None
    # Damage inside a pickle comes out as whatever the instruction that it hit raises.
    except Exception as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path} ({path.stat().st_size:,} bytes) can't be read because it is truncated or "
        f"damaged ({first_line(error)}); copy or download it again"
    )


def _check_dense(path: Path, name: str, tensor: Tensor) -> None:
    """UserError unless every number of a tensor stands in the file."""
    is_dense = tensor.layout == torch.strided and tensor.device.type == "cpu"
    is_dense = is_dense and not tensor.is_quantized
    if is_dense:
        needed = tensor.numel() * tensor.element_size()
        is_dense = needed <= tensor.untyped_storage().nbytes()
    if not is_dense:
        raise UserError(
            f"{path}: {name} is not an ordinary dense tensor; ask its author for model.safetensors"
        )
