"""Models in and out of the layouts that others use.

`load` reads a run, a checkpoint, a Hugging Face directory or Google's TensorFlow layout into one
form: a ModelConfig and a state dict with transformers' names in fp32. `save` writes that form.
The verbs `export` and `import` are in command.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from clue_ds.errors import UserError
from clue_ds.export import huggingface, onnx_graph, tensorflow
from clue_ds.export.sources import OpenedModel, open_model, opened
from clue_ds.model.weights import StateDict
from clue_ds.presets import ModelConfig

__all__ = ["LAYOUTS", "OpenedModel", "load", "open_model", "opened", "save"]

LAYOUTS: dict[str, Callable[..., Path]] = {
    "hf": huggingface.write,
    "tf": tensorflow.write,
    "onnx": onnx_graph.write,
}


def load(directory: str | Path) -> tuple[ModelConfig, StateDict]:
    """Config and weights of a run, a checkpoint, or a directory in Hugging Face's or TF's layout.

    The state dict has the names of transformers' BertForPreTraining, fp32, without vocabulary
    padding, tied entries present and sharing storage; heads that are not there are left out.
    UserError: not a model directory, damaged weights, shapes that disagree with the config.
    """
    source = open_model(directory)
    return source.config, source.state_dict


def save(
    config: ModelConfig,
    state_dict: StateDict,
    vocab_file: str | Path,
    directory: str | Path,
    to: str = "hf",
    lower_case: bool = True,
    force: bool = False,
    half: bool = False,
) -> Path:
    """Write a model that others can load; returns `directory`.

    `to`: hf, tf or onnx. The directory appears complete or not at all, and an existing one is
    replaced only with `force`. `half` stores fp16 (hf only). UserError: an unknown layout, a
    vocabulary of another size, a full disk.
    """
    check_layout(to, half)
    options = {"half": True} if half else {}
    return LAYOUTS[to](config, state_dict, vocab_file, directory, lower_case, force, **options)


def check_layout(to: str, half: bool) -> None:
    """UserError when `save` would refuse the layout, before any weights are read."""
    if to not in LAYOUTS:
        raise UserError(f"can't export to {to!r}; layouts: {', '.join(LAYOUTS)}")
    if half and to != "hf":
        raise UserError(f"--fp16 is for --to hf only: readers of the {to} layout expect fp32")
    if to == "onnx":
        onnx_graph.check_installed()
