"""Reads our TensorFlow exports with other people's code; runs where TensorFlow is, without clue_ds.

usage: python reader.py READER INPUTS.npz OUTPUT_DIR EXPORT_DIR...

READER is `bert4keras` or `keras_bert` (they write {name of EXPORT_DIR}.npz: `hidden` [B, S, H] and
`mlm` [B, S, V], probabilities) or `saver`: TensorFlow's own Saver, which restores through our .meta
and saves again, into {name}/.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

# The Keras that both readers were written for.
os.environ.update(TF_KERAS="1", TF_USE_LEGACY_KERAS="1", TF_CPP_MIN_LOG_LEVEL="3")

import numpy as np  # noqa: E402


def bert4keras(directory: Path, ids: np.ndarray, types: np.ndarray) -> dict[str, np.ndarray]:
    from bert4keras.backend import set_gelu
    from bert4keras.models import build_transformer_model

    set_gelu("tanh")  # what Google's "gelu" is
    files = (str(directory / "bert_config.json"), str(directory / "bert_model.ckpt"))
    hidden = build_transformer_model(*files).predict([ids, types], verbose=0)
    mlm = build_transformer_model(*files, with_mlm=True).predict([ids, types], verbose=0)
    return {"hidden": hidden, "mlm": mlm}


def keras_bert(directory: Path, ids: np.ndarray, types: np.ndarray) -> dict[str, np.ndarray]:
    from keras_bert import load_trained_model_from_checkpoint
    from tensorflow import keras

    files = (str(directory / "bert_config.json"), str(directory / "bert_model.ckpt"))
    # Its model with heads takes the longest input only, so ours is that long.
    model = load_trained_model_from_checkpoint(*files, training=True, seq_len=ids.shape[1])
    last = [layer.name for layer in model.layers if layer.name.endswith("FeedForward-Norm")][-1]
    outputs = [model.get_layer(last).output, model.get_layer("MLM-Sim").output]
    hidden, mlm = keras.Model(model.inputs[:2], outputs).predict([ids, types], verbose=0)
    return {"hidden": hidden, "mlm": mlm}


def saver(directory: Path, output: Path) -> None:
    """Import our graph, restore, save again; and an object checkpoint as TensorFlow 2 writes it."""
    import tensorflow as tf

    prefix = str(directory / "bert_model.ckpt")
    reader = tf.train.load_checkpoint(prefix)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        restored = tf.compat.v1.train.import_meta_graph(f"{prefix}.meta")
        restored.restore(session, prefix)
        variables: list[Any] = tf.compat.v1.global_variables()
        assert len(variables) == len(reader.get_variable_to_shape_map())
        for variable in variables:
            assert np.array_equal(session.run(variable), reader.get_tensor(variable.op.name))
        restored.save(session, str(output / "bert_model.ckpt"), write_meta_graph=False)
    tf.train.Checkpoint(a=tf.Variable([1.0, 2.5])).write(str(output / "object"))


def main() -> None:
    reader, inputs, output, *directories = sys.argv[1:]
    values = np.load(inputs)
    for directory in map(Path, directories):
        if reader == "saver":
            folder = Path(output) / directory.name
            folder.mkdir()
            saver(directory, folder)
            continue
        read = {"bert4keras": bert4keras, "keras_bert": keras_bert}[reader]
        outputs = read(directory, values["ids"], values["types"])
        np.savez(Path(output) / f"{directory.name}.npz", **outputs)


if __name__ == "__main__":
    main()
