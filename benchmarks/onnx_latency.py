"""`clue-ds bench onnx_latency`: an ONNX export against the legacy export of torch and transformers.

Both files hold the same classifier with the same random weights, and onnxruntime runs both with its
default optimizations on the same batches, in turns. The peer is what `torch.onnx.export(...,
dynamo=False)` makes of transformers' BertForSequenceClassification with eager attention, the form
that onnxruntime's optimizers were written for. Logits are compared before anything is timed. Half
of each batch is padding in its last row.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from clue_ds import export, presets
from clue_ds.benchmarks.description import write_results
from clue_ds.errors import UserError, existing_file
from clue_ds.export.onnx_model import layout as onnx_layout
from clue_ds.model.finetuned import FineTuned, unnamed
from clue_ds.model.init import initialize
from clue_ds.presets import ModelConfig

NUM_LABELS = 15
TOLERANCE = 1e-4
OPSET_OF_PEER = 14


def onnx_latency(
    vocab: Path,
    model: str = "roberta_tiny_clue",
    output: Path | None = None,
    batch_size: int = 8,
    length: int = 128,
    threads: int = 1,
    rounds: int = 30,
) -> None:
    """Compare the latency of an exported classifier with that of transformers' legacy export.

    Args:
        vocab: a vocab.txt of the preset's size.
        model: the preset whose shape is measured.
        output: JSON file for the figures, with device, versions and command.
        batch_size: texts of a batch.
        length: tokens of a text.
        threads: threads of onnxruntime.
        rounds: batches of each contender; they take turns.
    """
    config = presets.get(model)
    with tempfile.TemporaryDirectory() as scratch:
        ours, peer = _files(config, existing_file(vocab, "vocabulary"), Path(scratch))
        sessions = {"clue_ds": _session(ours, threads), "legacy export": _session(peer, threads)}
        inputs = onnx_layout.batch(config, batch_size, length)
        _check(sessions, inputs)
        seconds: dict[str, list[float]] = {name: [] for name in sessions}
        for _ in range(rounds):
            for name, session in sessions.items():
                begin = time.perf_counter()
                session.run(["logits"], inputs)
                seconds[name].append(time.perf_counter() - begin)
        sizes = {"clue_ds": ours.stat().st_size, "legacy export": peer.stat().st_size}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = medians["clue_ds"] / medians["legacy export"]
    for name, median in medians.items():
        print(f"{name:>14}  {1000 * median:8.1f} ms per batch, {sizes[name]:,} bytes")
    print(f"the latency of clue_ds is {ratio:.2f} times that of the legacy export")
    if output is not None:
        figures = {"milliseconds": {n: [1000 * s for s in v] for n, v in seconds.items()}}
        write_results(output, {**figures, "bytes": sizes, "ratio": ratio})


def _files(config: ModelConfig, vocab: Path, folder: Path) -> tuple[Path, Path]:
    """The two files of one classifier: ours, and the legacy exporter's."""
    import torch
    import transformers

    from clue_ds.tasks.heads import BertForSequenceClassification

    network = BertForSequenceClassification(config, NUM_LABELS)
    initialize(network, 0)
    about = FineTuned(unnamed(NUM_LABELS))
    state = network.state_dict()
    hf = export.save(config, state, vocab, folder / "hf", finetuned=about)
    ours = export.save(config, state, vocab, folder / "onnx", to="onnx", finetuned=about)
    peer = transformers.BertForSequenceClassification.from_pretrained(
        hf, attn_implementation="eager"
    ).eval()
    example = tuple(torch.from_numpy(v) for v in onnx_layout.batch(config, 2, 7).values())
    names = ["input_ids", "attention_mask", "token_type_ids"]
    axes = {name: {0: "batch", 1: "length"} for name in names} | {"logits": {0: "batch"}}

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = peer

        def forward(self, ids: Any, mask: Any, types: Any) -> Any:
            found = self.network(input_ids=ids, attention_mask=mask, token_type_ids=types)
            return found.logits

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Logits(), example, str(folder / "peer.onnx"), dynamo=False, input_names=names,
            output_names=["logits"], dynamic_axes=axes, opset_version=OPSET_OF_PEER,
        )  # fmt: skip
    return ours / "model.onnx", folder / "peer.onnx"


def _session(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _check(sessions: dict[str, Any], inputs: dict[str, np.ndarray]) -> None:
    one, other = (session.run(["logits"], inputs)[0] for session in sessions.values())
    difference = float(np.abs(one - other).max())
    if difference > TOLERANCE:
        raise UserError(
            f"the logits differ by {difference:.1e}, more than {TOLERANCE:.0e}, so nothing was "
            "timed"
        )
