"""Writes an ONNX file from a graph and a state dict, one tensor at a time.

Guarantees: writing needs the memory of the largest tensor beside the weights; the file's bytes
depend on the model and the opset only. The file is of the oldest IR that has the opset, because a
runtime refuses files of a newer IR than its own: onnxruntime 1.14 reads IR 8.

The messages are those of onnx.proto: field 7 of the model is the graph, whose field 5 is a tensor
with dims (1), data_type (2), name (8), raw_data (9) or external_data (13) and data_location (14).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from onnx import TensorProto, helper

from clue_ds import __version__
from clue_ds.errors import UserError
from clue_ds.export.onnx_model import DEFAULT_OPSET
from clue_ds.export.onnx_model.graph import INPUTS, Graph
from clue_ds.export.protobuf import integer, message, varint
from clue_ds.model.weights import StateDict

# Opset -> the IR of the first release of onnx that had it. LayerNormalization came with 17.
IR_VERSIONS = {17: 8, 18: 8, 19: 9, 20: 9, 21: 10}
GRAPH_FIELD, INITIALIZER_FIELD, RAW_DATA_FIELD = 7, 5, 9
EXTERNAL = 1  # TensorProto.DataLocation
TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
# protobuf reads no message of 2 GiB: a larger model keeps its weights in a file beside it.
PROTOBUF_LIMIT = 2**31 - 2**24


def check_opset(opset: int) -> None:
    """UserError unless this opset can be written."""
    if opset not in IR_VERSIONS:
        raise UserError(
            f"--opset {opset} is not one of {', '.join(map(str, IR_VERSIONS))}; the default "
            f"{DEFAULT_OPSET} is read by onnxruntime 1.13 and later"
        )


def save(graph: Graph, state: StateDict, path: Path, opset: int = DEFAULT_OPSET) -> None:
    """Write the model to `path`, and weights of 2 GiB or more to `path`.data."""
    skeleton = _skeleton(graph)
    sizes = [4 * state[weight.source].numel() for weight in graph.weights.values()]
    is_external = sum(sizes) > PROTOBUF_LIMIT
    beside = path.with_name(f"{path.name}.data")
    heads = [
        (b"", message(INITIALIZER_FIELD, *_constant(n, v))) for n, v in graph.constants.items()
    ]
    parts = list(_parts(graph, state, beside.name if is_external else None))
    length = len(skeleton) + sum(len(whole) for _, whole in heads)
    length += sum(len(head) + (0 if is_external else size) for head, size in parts)
    with open(path, "wb") as file:
        file.write(_model_head(opset))
        file.write(varint(GRAPH_FIELD << 3 | 2) + varint(length) + skeleton)
        for _, whole in heads:
            file.write(whole)
        if is_external:
            file.writelines(head for head, _ in parts)
            with open(beside, "wb") as data:
                _write_arrays(graph, state, data, [])
        else:
            _write_arrays(graph, state, file, [head for head, _ in parts])


def _write_arrays(graph: Graph, state: StateDict, file: IO[bytes], heads: list[bytes]) -> None:
    """Write every weight, after its head if there are heads."""
    for number, weight in enumerate(graph.weights.values()):
        if heads:
            file.write(heads[number])
        tensor = state[weight.source].detach().float()
        array = (tensor.T if weight.is_transposed else tensor).contiguous().numpy()
        file.write(array.astype("<f4", copy=False).data)


def _parts(graph: Graph, state: StateDict, beside: str | None) -> Iterator[tuple[bytes, int]]:
    """(an initializer up to its bytes, the number of these bytes) for every weight.

    With `beside` the initializer is whole, and says where its bytes are in that file.
    """
    offset = 0
    for name, weight in graph.weights.items():
        shape = tuple(state[weight.source].shape)
        size = 4 * state[weight.source].numel()
        about = _about(name, shape[::-1] if weight.is_transposed else shape, TensorProto.FLOAT)
        if beside is None:
            about += varint(RAW_DATA_FIELD << 3 | 2) + varint(size)
            yield varint(INITIALIZER_FIELD << 3 | 2) + varint(len(about) + size) + about, size
        else:
            for key, value in (("location", beside), ("offset", offset), ("length", size)):
                about += message(13, message(1, key), message(2, str(value)))
            yield message(INITIALIZER_FIELD, about + integer(14, EXTERNAL)), size
            offset += size


def _about(name: str, shape: tuple[int, ...], kind: int) -> bytes:
    dims = b"".join(integer(1, size) for size in shape)
    return dims + integer(2, kind) + message(8, name)


def _constant(name: str, value: np.ndarray) -> tuple[bytes, bytes]:
    about = _about(name, value.shape, TYPES[value.dtype.name])
    data = value.astype(value.dtype.newbyteorder("<"), copy=False).tobytes()
    return about, varint(RAW_DATA_FIELD << 3 | 2) + varint(len(data)) + data


def _skeleton(graph: Graph) -> bytes:
    """The GraphProto without its initializers; protobuf takes its fields in any order."""
    shape = graph.input_shape
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name in INPUTS]
    proto = helper.make_graph(graph.nodes, "bert", inputs, graph.outputs)
    return proto.SerializeToString(deterministic=True)


def _model_head(opset: int) -> bytes:
    """The fields of the ModelProto before its graph."""
    empty = helper.make_model(
        helper.make_graph([], "", [], []),
        producer_name="clue_ds",
        producer_version=__version__,
        ir_version=IR_VERSIONS[opset],
        opset_imports=[helper.make_opsetid("", opset)],
    )
    empty.ClearField("graph")
    return empty.SerializeToString(deterministic=True)
