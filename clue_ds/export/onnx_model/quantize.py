"""The int8 form of a model.onnx, and what it changes in the answers to a file of texts.

    model_quantized.onnx   the name under which optimum looks for it
    quantization.json      what was measured

Dynamic quantization: the matrices of the encoder and the word embeddings are stored as int8 with a
scale for each column, and activations are quantized when the model runs. Weights use 7 of the 8
bits, because on processors without VNNI the products of two 8-bit numbers overflow the 16 bits of
their sum, which gives wrong answers there and nowhere else.

Guarantees: the int8 model is written only together with a measurement on texts of the user's.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from clue_ds.errors import UserError, existing_file
from clue_ds.export.onnx_model import layout

FILE = "model_quantized.onnx"
REPORT = "quantization.json"
# The fields of a text in CLUE's files; the first ones that a record has are read.
FIELDS = (("sentence1", "sentence2"), ("sentence",), ("text",), ("abst",))
BATCH_SIZE = 16
MOST_TEXTS = 20_000


def write(directory: Path, texts: Path, max_length: int) -> dict[str, Any]:
    """Quantize the model.onnx in `directory` and measure it; returns what was measured."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    records = read(texts)
    with _quietly():
        quantize_dynamic(
            str(directory / layout.FILE),
            str(directory / FILE),
            op_types_to_quantize=["MatMul", "Gather"],
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.enable_truncation(max_length)
    tokenizer.enable_padding()
    sizes = [(directory / name).stat().st_size for name in (layout.FILE, FILE)]
    found = {"file": texts.name, "num_texts": len(records), "bytes": sizes}
    found |= _compare(directory, tokenizer, records)
    (directory / REPORT).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def sentence(found: dict[str, Any]) -> str:
    """What was measured, for the user."""
    before, after = found["bytes"]
    said = f"int8: {before:,} bytes become {after:,}; on {found['num_texts']:,} texts "
    if "changed_answers" in found:
        share = found["changed_answers"] / found["num_texts"]
        said += f"{found['changed_answers']:,} answers change ({share:.2%})"
        if "accuracy" in found:
            said += ", accuracy {:.2%} becomes {:.2%}".format(*found["accuracy"])
        return f"{said}, and probabilities by at most {found['largest_change']:.3f}"
    return (
        f"{said}the cosine of the mean vectors before and after is at least {found['cosine']:.4f}"
    )


def read(path: Path) -> list[dict[str, Any]]:
    """{"text": one or two texts, "label": text or None} for each line; UserError names the line."""
    records = []
    with open(existing_file(path, "texts"), encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}:{number}: not JSON: {error}; correct the line") from None
            records.append(_record(record, f"{path}:{number}"))
            if len(records) == MOST_TEXTS:
                break
    if not records:
        raise UserError(f"{path} has no lines; give a file with one JSON object per line")
    return records


def _record(record: Any, where: str) -> dict[str, Any]:
    for fields in FIELDS:
        if isinstance(record, dict) and all(isinstance(record.get(f), str) for f in fields):
            label = record.get("label")
            return {
                "text": tuple(record[field] for field in fields),
                "label": None if label is None else str(label),
            }
    names = ", ".join(" and ".join(fields) for fields in FIELDS)
    raise UserError(f"{where}: a line must have one of the fields {names}, with texts; add one")


def _compare(
    directory: Path, tokenizer: tokenizers.Tokenizer, records: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """What the int8 model answers otherwise than the fp32 one."""
    first, second = (layout.session(directory / name) for name in (layout.FILE, FILE))
    names = [output.name for output in first.get_outputs()]
    shapes = {output.name: output.shape for output in first.get_outputs()}
    is_classifier = "logits" in names and len(shapes["logits"]) == 2
    output = "logits" if is_classifier else "last_hidden_state"
    answers: list[list[np.ndarray]] = [[], []]
    for inputs in _batches(tokenizer, [record["text"] for record in records]):
        for rows, opened in zip(answers, (first, second), strict=True):
            (values,) = opened.run([output], inputs)
            mask = inputs["attention_mask"][..., None]
            rows.append(values if is_classifier else (values * mask).sum(1) / mask.sum(1))
    before, after = (np.concatenate(rows) for rows in answers)
    if not is_classifier:
        lengths = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
        return {"cosine": float(((before * after).sum(1) / lengths).min())}
    one, other = _probabilities(before), _probabilities(after)
    found: dict[str, Any] = {
        "changed_answers": int((one.argmax(1) != other.argmax(1)).sum()),
        "largest_change": float(np.abs(one - other).max()),
    }
    labels = _labels(directory)
    right = np.array([labels.get(record["label"], -1) for record in records])
    if (right >= 0).all():
        found["accuracy"] = [float((p.argmax(1) == right).mean()) for p in (one, other)]
    return found


def _batches(
    tokenizer: tokenizers.Tokenizer, texts: list[tuple[str, ...]]
) -> Iterator[dict[str, np.ndarray]]:
    for begin in range(0, len(texts), BATCH_SIZE):
        some = texts[begin : begin + BATCH_SIZE]
        encoded = tokenizer.encode_batch([text[0] if len(text) == 1 else text for text in some])
        yield {
            "input_ids": np.array([one.ids for one in encoded]),
            "attention_mask": np.array([one.attention_mask for one in encoded]),
            "token_type_ids": np.array([one.type_ids for one in encoded]),
        }


def _labels(directory: Path) -> dict[str | None, int]:
    """Label -> id, for the labels as the task's files write them."""
    values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    names = [values["id2label"][str(i)] for i in range(len(values.get("id2label", {})))]
    return {label: i for i, label in enumerate(values.get("clue_ds", {}).get("labels", names))}


def _probabilities(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the quantizer's advice about a pre-processing that this graph does not need."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
