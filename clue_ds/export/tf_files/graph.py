"""PREFIX.meta: the graph that TensorFlow 1 code imports before it restores a checkpoint.

It holds the variables and a saver, but not the network: `tf.train.import_meta_graph` can restore
from it in TensorFlow 1.15 and 2.x, and scripts that only check for the file find it. Each variable
is zeros until it is restored.

The messages are tensorflow/core/framework/{graph,node_def,attr_value,tensor,variable}.proto and
tensorflow/core/protobuf/{meta_graph,saver}.proto.
"""

from __future__ import annotations

import struct

from clue_ds.export.protobuf import fixed32, integer, message, varint

FLOAT, STRING = 1, 7
PRODUCER = 27  # a GraphDef version that every TensorFlow since 1.9 accepts
SAVER_V2 = 2


def _shape(dims: tuple[int, ...]) -> bytes:
    return b"".join(message(2, integer(1, size)) for size in dims)


def _attribute(name: str, value: bytes) -> bytes:
    return message(5, message(1, name), message(2, value))


def _type(name: str, dtype: int) -> bytes:
    return _attribute(name, integer(6, dtype))


def _node(name: str, op: str, inputs: list[str], *attributes: bytes) -> bytes:
    """A GraphDef.node field."""
    return message(
        1, message(1, name), message(2, op), *(message(3, i) for i in inputs), *attributes
    )


def _zeros(name: str, dims: tuple[int, ...]) -> bytes:
    """A constant with one stored value, which TensorFlow broadcasts to the shape."""
    tensor = integer(1, FLOAT) + message(2, _shape(dims)) + message(5, struct.pack("<f", 0.0))
    return _node(name, "Const", [], _type("dtype", FLOAT), _attribute("value", message(8, tensor)))


def _strings(name: str, values: list[str], is_scalar: bool = False) -> bytes:
    shape = b"" if is_scalar else _shape((len(values),))
    tensor = integer(1, STRING) + message(2, shape) + b"".join(message(8, v) for v in values)
    return _node(name, "Const", [], _type("dtype", STRING), _attribute("value", message(8, tensor)))


def _assign(name: str, variable: str, value: str) -> bytes:
    return _node(
        name,
        "Assign",
        [variable, value],
        _type("T", FLOAT),
        _attribute("use_locking", integer(5, 1)),
        _attribute("validate_shape", integer(5, 1)),
    )


def _variable(name: str, dims: tuple[int, ...]) -> list[bytes]:
    zeros, placed = f"{name}/Initializer/zeros", (_type("T", FLOAT),)
    return [
        _zeros(zeros, dims),
        _node(
            name,
            "VariableV2",
            [],
            _attribute("container", message(2)),
            _type("dtype", FLOAT),
            _attribute("shape", message(7, _shape(dims))),
            _attribute("shared_name", message(2)),
        ),
        _assign(f"{name}/Assign", name, zeros),
        _node(f"{name}/read", "Identity", [name], *placed),
    ]


def _type_list(num: int) -> bytes:
    packed = varint(FLOAT) * num
    return _attribute("dtypes", message(1, message(6, packed)))


def _saver(names: list[str]) -> list[bytes]:
    slices = [""] * len(names)
    restored = ["save/RestoreV2" + (f":{i}" if i else "") for i in range(len(names))]
    return [
        _strings("save/Const", ["model"], is_scalar=True),
        _strings("save/SaveV2/tensor_names", names),
        _strings("save/SaveV2/shape_and_slices", slices),
        _node(
            "save/SaveV2",
            "SaveV2",
            ["save/Const", "save/SaveV2/tensor_names", "save/SaveV2/shape_and_slices", *names],
            _type_list(len(names)),
        ),
        _node(
            "save/control_dependency",
            "Identity",
            ["save/Const", "^save/SaveV2"],
            _type("T", STRING),
        ),
        _strings("save/RestoreV2/tensor_names", names),
        _strings("save/RestoreV2/shape_and_slices", slices),
        _node(
            "save/RestoreV2",
            "RestoreV2",
            ["save/Const", "save/RestoreV2/tensor_names", "save/RestoreV2/shape_and_slices"],
            _type_list(len(names)),
        ),
        *(_assign(f"save/Assign_{i}", n, restored[i]) for i, n in enumerate(names)),
        _node("save/restore_all", "NoOp", [f"^save/Assign_{i}" for i in range(len(names))]),
    ]


def _collection(key: str, names: list[str]) -> bytes:
    definitions = [
        message(1, f"{name}:0")
        + message(2, f"{name}/Assign")
        + message(3, f"{name}/read:0")
        + message(6, f"{name}/Initializer/zeros:0")
        + integer(7, 1)
        for name in names
    ]
    values = message(2, *(message(1, definition) for definition in definitions))
    return message(4, message(1, key), message(2, values))


def meta_graph(shapes: dict[str, tuple[int, ...]]) -> bytes:
    """A serialized MetaGraphDef of fp32 variables: name -> shape."""
    names = sorted(shapes)
    nodes = [node for name in names for node in _variable(name, shapes[name])]
    graph = b"".join(nodes + _saver(names)) + message(4, integer(1, PRODUCER))
    saver = (
        message(1, "save/Const:0")
        + message(2, "save/control_dependency:0")
        + message(3, "save/restore_all")
        + integer(4, 5)
        + fixed32(6, struct.unpack("<I", struct.pack("<f", 10_000.0))[0])
        + integer(7, SAVER_V2)
    )
    collections = [_collection(key, names) for key in ("trainable_variables", "variables")]
    return b"".join([message(2, graph), message(3, saver), *collections])
