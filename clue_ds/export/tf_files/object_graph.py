"""The graph of an object checkpoint of TensorFlow 2: which variable is stored under which key.

Such a checkpoint stores a variable under the path of attributes that leads to it, such as
`model/layer_with_weights-4/q_dense/kernel/.ATTRIBUTES/VARIABLE_VALUE`, which is the program's own
business. The graph beside it also keeps each variable's name, as a checkpoint of TensorFlow 1
would call it. It is a TrackableObjectGraph (tensorflow/core/protobuf/
trackable_object_graph.proto): nodes (1) with attributes (2) that have a full_name (2) and a
checkpoint_key (3).
"""

from __future__ import annotations

from clue_ds.errors import UserError
from clue_ds.export import protobuf
from clue_ds.export.protobuf import WireError
from clue_ds.export.tf_files.bundle import Reader

KEY = "_CHECKPOINTABLE_OBJECT_GRAPH"
# Parts of the keys of variables that are no weights: an optimizer's (before Keras 2.11 they are
# slots, and since then a list), and the counter of tf.train.Checkpoint.
NO_WEIGHTS = {"optimizer", ".OPTIMIZER_SLOT", "_variables", "save_counter"}


def is_object_checkpoint(reader: Reader) -> bool:
    return KEY in reader.entries


def variables(reader: Reader) -> dict[str, str]:
    """Name -> key of every variable of the model, without those of an optimizer.

    A variable without a name, or with that of another one, has its key for a name.
    """
    content = reader.read_string(KEY)
    found: dict[str, str] = {}
    try:
        for node in _messages(content, 1):
            for attribute in _messages(node, 2):
                values = protobuf.scalars(attribute)
                name, key = (_text(values.get(number, b"")) for number in (2, 3))
                if key in reader.entries and not NO_WEIGHTS & set(key.split("/")):
                    found[name if name and name not in found else key] = key
    except (WireError, ValueError) as error:
        raise UserError(
            f"{reader.path}: the graph of the object checkpoint is damaged ({error}); copy or "
            "download it again"
        ) from None
    return found


def _messages(data: bytes, number: int) -> list[bytes]:
    return [value for n, value in protobuf.fields(data) if n == number and type(value) is bytes]


def _text(value: int | bytes) -> str:
    if not isinstance(value, bytes):
        raise WireError("a name is a number")
    return value.decode()
