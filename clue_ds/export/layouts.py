"""The table of layouts; models are read from any of them with `load`, and written with `save`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from clue_ds.errors import UserError
from clue_ds.export import huggingface, tensorflow
from clue_ds.export.embedder import Pooling
from clue_ds.export.legacy import uer
from clue_ds.export.onnx_model import DEFAULT_OPSET
from clue_ds.export.onnx_model import layout as onnx_layout
from clue_ds.export.sources import open_model
from clue_ds.model.finetuned import FineTuned
from clue_ds.model.weights import StateDict
from clue_ds.presets import ModelConfig

LAYOUTS: dict[str, Callable[..., Path]] = {
    "hf": huggingface.write,
    "tf": tensorflow.write,
    "uer": uer.write,
    "onnx": onnx_layout.write,
}


def load(directory: str | Path) -> tuple[ModelConfig, StateDict]:
    """Config and weights of a run, a checkpoint, or a directory in Hugging Face's or TF's layout.

    The state dict has the names of transformers' BertForPreTraining, in fp32 and without vocabulary
    padding. Tied entries are present and share storage; heads that the files lack are absent.
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
    finetuned: FineTuned | None = None,
    legacy: bool = False,
    pooling: Pooling | None = None,
    opset: int = DEFAULT_OPSET,
    quantized_on: Path | None = None,
) -> Path:
    """Write a model in a layout that other programs load; returns `directory`.

    `to` is hf, tf, uer or onnx. The directory appears complete or not at all, and an existing one
    is replaced only with `force`. hf only: `half` stores fp16, `legacy` also writes
    pytorch_model.bin, and with `pooling` it is a directory for programs that embed texts. onnx
    only: `opset` is that of the file, and `quantized_on` a file of texts on which an int8 model
    beside it is measured. `finetuned`: labels, task and so on of a classifier
    (`OpenedModel.finetuned`), which every layout carries. UserError: an unknown layout, a
    vocabulary whose size differs from the model's, a full disk.
    """
    check_layout(to, half, legacy)
    options: dict[str, Any] = {"finetuned": finetuned}
    options |= {"half": half, "legacy": legacy, "pooling": pooling} if to == "hf" else {}
    options |= {"opset": opset, "quantized_on": quantized_on} if to == "onnx" else {}
    return LAYOUTS[to](config, state_dict, vocab_file, directory, lower_case, force, **options)


def check_layout(to: str, half: bool, legacy: bool = False) -> None:
    """UserError when `save` would refuse the layout, before any weights are read."""
    if to not in LAYOUTS:
        raise UserError(f"can't export to {to!r}; layouts: {', '.join(LAYOUTS)}")
    if half and to != "hf":
        raise UserError(f"--fp16 works with --to hf only: readers of the {to} layout expect fp32")
    if legacy and to != "hf":
        raise UserError(f"--legacy works with --to hf only: the {to} layout has no .bin; drop it")
    if to == "onnx":
        onnx_layout.check_installed()
