"""Saves a BERT with other people's programs; runs where TensorFlow is, without clue_ds.

usage: python writer.py PROGRAM GOOGLE_DIR HF_DIR INPUTS.npz OUTPUT_DIR

PROGRAM loads the model from GOOGLE_DIR, or from HF_DIR (transformers), and saves it in OUTPUT_DIR
in the forms that it has: .h5 files of weights and of a whole model, and object checkpoints. Beside
them is `expected.npz`, what it computes: `hidden` [B, S, H], and `mlm` [B, S, V], probabilities.

PROGRAM is bert4keras (also on Keras 2.3, with TF_KERAS=0), keras_bert, transformers (its packages
are added from TRANSFORMERS_PACKAGES, a site-packages) or garden (the package tf-models-official).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("TF_KERAS", "1")
if os.environ["TF_KERAS"] == "0":
    del os.environ["TF_KERAS"]
os.environ.update(TF_USE_LEGACY_KERAS="1", TF_CPP_MIN_LOG_LEVEL="3", USE_TF="1")

import numpy as np  # noqa: E402

if TYPE_CHECKING:
    Inputs = dict[str, np.ndarray]


def bert4keras(google: Path, hf: Path, inputs: Inputs, output: Path) -> Inputs:
    from bert4keras.models import build_transformer_model

    files = (str(google / "bert_config.json"), str(google / "bert_model.ckpt"))
    model = build_transformer_model(*files, with_pool=True, with_nsp=True, with_mlm=True)
    model.save_weights(str(output / "weights.h5"))
    if "TF_KERAS" in os.environ:
        model.save(str(output / "whole.h5"))
        model.save_weights(str(output / "object"))
    ids = [inputs["ids"], inputs["types"]]
    hidden = build_transformer_model(*files).predict(ids, verbose=0)
    mlm = build_transformer_model(*files, with_mlm=True).predict(ids, verbose=0)
    return {"hidden": hidden, "mlm": mlm}


def keras_bert(google: Path, hf: Path, inputs: Inputs, output: Path) -> Inputs:
    from keras_bert import load_trained_model_from_checkpoint
    from tensorflow import keras

    files = (str(google / "bert_config.json"), str(google / "bert_model.ckpt"))
    model = load_trained_model_from_checkpoint(
        *files, training=True, seq_len=inputs["ids"].shape[1]
    )
    model.save_weights(str(output / "weights.h5"))
    model.save(str(output / "whole.h5"))
    model.save_weights(str(output / "object"))
    last = [layer.name for layer in model.layers if layer.name.endswith("FeedForward-Norm")][-1]
    outputs = [model.get_layer(last).output, model.get_layer("MLM-Sim").output]
    ids = [inputs["ids"], inputs["types"]]
    hidden, mlm = keras.Model(model.inputs[:2], outputs).predict(ids, verbose=0)
    return {"hidden": hidden, "mlm": mlm}


def transformers(google: Path, hf: Path, inputs: Inputs, output: Path) -> Inputs:
    sys.path.append(os.environ["TRANSFORMERS_PACKAGES"])
    import tensorflow as tf
    from transformers import TFBertForPreTraining, TFBertForSequenceClassification

    model = TFBertForPreTraining.from_pretrained(str(hf), from_pt=True, output_hidden_states=True)
    found = model(inputs["ids"], token_type_ids=inputs["types"])
    model.save_weights(str(output / "weights.h5"))
    model.save_weights(str(output / "object"))
    # A trainer's checkpoint, with an optimizer that has made a step.
    optimizer = tf.keras.optimizers.Adam(0.0)
    optimizer.apply_gradients([(tf.zeros_like(v), v) for v in model.trainable_variables])
    tf.train.Checkpoint(model=model, optimizer=optimizer).save(str(output / "trainer"))
    # Google's names in an object checkpoint, and a model that is no BERT.
    reader = tf.train.load_checkpoint(str(google / "bert_model.ckpt"))
    names = sorted(reader.get_variable_to_shape_map())
    variables = [tf.Variable(reader.get_tensor(name), name=name) for name in names]
    tf.train.Checkpoint(variables=variables).write(str(output / "google"))
    tf.train.Checkpoint(a=tf.Variable([1.0, 2.5], name="other")).write(str(output / "other"))
    classifier = TFBertForSequenceClassification.from_pretrained(
        str(hf), from_pt=True, num_labels=3
    )
    logits = classifier(inputs["ids"], token_type_ids=inputs["types"]).logits.numpy()
    classifier.save_weights(str(output / "classifier"))
    return {
        "logits": logits,
        "hidden": found.hidden_states[-1].numpy(),
        "mlm": tf.nn.softmax(found.prediction_logits, -1).numpy(),
    }


def garden(google: Path, hf: Path, inputs: Inputs, output: Path) -> Inputs:
    """BertEncoder by Model Garden's own converter, and BertEncoderV2 with the heads."""
    import tensorflow as tf
    from official.legacy.bert.configs import BertConfig
    from official.modeling import tf_utils
    from official.nlp.modeling import layers, models, networks
    from official.nlp.tools import tf1_bert_checkpoint_converter_lib as names
    from official.nlp.tools import tf2_bert_encoder_checkpoint_converter as converter

    prefix, config = (
        str(google / "bert_model.ckpt"),
        BertConfig.from_json_file(str(google / "bert_config.json")),
    )
    converter.convert_checkpoint(config, str(output / "encoder"), prefix, "encoder")
    encoder = networks.BertEncoderV2(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        max_sequence_length=config.max_position_embeddings,
        type_vocab_size=config.type_vocab_size,
        inner_dim=config.intermediate_size,
    )
    head = layers.ClassificationHead(config.hidden_size, 2, name="next_sentence")
    gelu = tf_utils.get_activation("gelu")
    model = models.BertPretrainerV2(encoder, mlm_activation=gelu, classification_heads=[head])
    words = {
        "input_word_ids": inputs["ids"],
        "input_mask": np.ones_like(inputs["ids"]),
        "input_type_ids": inputs["types"],
    }
    positions = np.arange(inputs["ids"].shape[1])[None].repeat(len(inputs["ids"]), 0)
    model({**words, "masked_lm_positions": positions})
    reader = tf.train.load_checkpoint(prefix)
    theirs = {
        names._bert_name_replacement(name, names.BERT_V2_NAME_REPLACEMENTS): name
        for name in reader.get_variable_to_shape_map()
    }
    # Where the head keeps what the converter knows as another program's NSP head.
    theirs["next_sentence/pooler_dense/kernel"] = "bert/pooler/dense/kernel"
    theirs["next_sentence/pooler_dense/bias"] = "bert/pooler/dense/bias"
    theirs["next_sentence/logits/bias"] = "cls/seq_relationship/output_bias"
    for variable in model.weights:
        name = variable.name[: -len(":0")]
        found = [theirs[end] for end in theirs if f"/{name}".endswith(f"/{end}")]
        if name.endswith("next_sentence/logits/kernel"):
            value = reader.get_tensor("cls/seq_relationship/output_weights").T
        else:
            value = reader.get_tensor(max(found, key=len)).reshape(variable.shape)
        variable.assign(value)
    tf.train.Checkpoint(model=model, **model.checkpoint_items).write(str(output / "object"))
    found = model({**words, "masked_lm_positions": positions})
    encoder = converter._create_bert_model(config)
    tf.train.Checkpoint(encoder=encoder).restore(str(output / "encoder-1")).assert_consumed()
    classifier = models.BertClassifier(encoder, 3)
    logits = classifier(words).numpy()
    tf.train.Checkpoint(model=classifier).write(str(output / "classifier"))
    return {
        "logits": logits,
        "hidden": found["sequence_output"].numpy(),
        "mlm": tf.nn.softmax(found["mlm_logits"], -1).numpy(),
    }


PROGRAMS: dict[str, Any] = {
    "bert4keras": bert4keras,
    "keras_bert": keras_bert,
    "transformers": transformers,
    "garden": garden,
}


def main() -> None:
    program, google, hf, inputs, output = sys.argv[1:]
    place = Path(output)
    place.mkdir(parents=True)
    found = PROGRAMS[program](Path(google), Path(hf), dict(np.load(inputs)), place)
    np.savez(str(place / "expected.npz"), **found)


if __name__ == "__main__":
    main()
