"""The operations of a BERT as an ONNX graph, built node by node.

Guarantees: the graph has the form that onnxruntime's optimizers know from older exports of
transformers (one matrix product for each of query, key and value, an additive mask, a division by
the square root of the head size), so that they fuse every attention, GELU and LayerNormalization.
Nothing in it depends on the machine or the directory that made it. Weights are named, not held:
file.py writes them.

Rejected: torch's exporter (its graph holds stack traces with paths of this machine, an IsNaN for
each softmax, and no form that an optimizer fuses; it holds several copies of the weights in memory,
and needs an IR that onnxruntime before 1.18 refuses).

B: sequences   S: positions   N: heads   D: head size   H: hidden size
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper

from clue_ds.model.finetuned import MULTIPLE_CHOICE, TOKENS
from clue_ds.model.weights import (
    CLASSIFIER_BIAS,
    CLASSIFIER_WEIGHT,
    DECODER_BIAS,
    DECODER_WEIGHT,
    NEXT_SENTENCE_WEIGHT,
    POOLER_WEIGHT,
    PREDICTION_BIAS,
    QA_WEIGHT,
    WORD_EMBEDDINGS,
    StateDict,
    is_tied,
)
from clue_ds.presets import ModelConfig

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
BATCH, CHOICES, LENGTH = "batch_size", "num_choices", "sequence_length"
# What is added to the scores of padding: the smallest float32, as in transformers.
MASKED = float(np.finfo(np.float32).min)


class Weight(NamedTuple):
    """A tensor of the state dict as the graph wants it."""

    source: str
    is_transposed: bool = False


class Graph:
    """Nodes, weights and constants; every method returns the name of its result."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, Weight] = {}
        self.constants: dict[str, np.ndarray] = {}
        self.outputs: list[onnx.ValueInfoProto] = []
        self.input_shape: list[str] = [BATCH, LENGTH]
        self.inputs = list(INPUTS)  # names of the [B, S] that the encoder reads

    def node(self, kind: str, name: str, *inputs: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def constant(self, name: str, value: Any, dtype: type = np.int64) -> str:
        return self._once(name, np.array(value, dtype))

    def _once(self, name: str, value: np.ndarray) -> str:
        self.constants[name] = value
        return name

    def weight(self, name: str, is_transposed: bool = False) -> str:
        stored = f"{name}.transposed" if is_transposed else name
        self.weights[stored] = Weight(name, is_transposed)
        return stored

    def output(self, name: str, source: str, shape: list[str | int]) -> None:
        """Make `source` an output of the model."""
        self.node("Identity", name, source)
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))

    def dense(self, name: str, x: str) -> str:
        """x W^T + b with the parameters called `name`."""
        product = self.node("MatMul", f"{name}/MatMul", x, self.weight(f"{name}.weight", True))
        return self.node("Add", f"{name}/Add", product, self.weight(f"{name}.bias"))

    def layer_norm(self, name: str, x: str) -> str:
        parameters = (self.weight(f"{name}.weight"), self.weight(f"{name}.bias"))
        epsilon = self.config.layer_norm_eps
        return self.node("LayerNormalization", name, x, *parameters, axis=-1, epsilon=epsilon)

    def gelu(self, name: str, x: str) -> str:
        """The erf or the tanh form, in the operations that torch's exporters write."""
        half, one = self._scalar("half", 0.5), self._scalar("one", 1.0)
        if self.config.gelu_approximation == "none":
            scaled = self.node("Div", f"{name}/Div", x, self._scalar("sqrt_2", math.sqrt(2)))
            cdf = self.node("Erf", f"{name}/Erf", scaled)
            cdf = self.node("Add", f"{name}/Add", cdf, one)
            return self.node("Mul", f"{name}/Mul_1", self.node("Mul", f"{name}/Mul", x, cdf), half)
        cube = self.node("Pow", f"{name}/Pow", x, self._scalar("three", 3.0))
        cube = self.node("Mul", f"{name}/Mul", cube, self._scalar("cubic", 0.044715))
        inner = self.node("Add", f"{name}/Add", x, cube)
        scale = self._scalar("sqrt_2_over_pi", math.sqrt(2 / math.pi))
        inner = self.node("Tanh", f"{name}/Tanh", self.node("Mul", f"{name}/Mul_1", inner, scale))
        cdf = self.node("Add", f"{name}/Add_1", inner, one)
        return self.node("Mul", f"{name}/Mul_3", self.node("Mul", f"{name}/Mul_2", x, half), cdf)

    def _scalar(self, name: str, value: float) -> str:
        return self.constant(f"constant/{name}", value, np.float32)


def build(config: ModelConfig, state: StateDict, architecture: str | None) -> Graph:
    """The graph with every output that `state` has weights for.

    `architecture`: of a fine-tuned model; it says what the classifier classifies (FineTuned).
    """
    graph = Graph(config)
    is_choice = architecture == MULTIPLE_CHOICE
    if is_choice:
        graph.input_shape = [BATCH, CHOICES, LENGTH]
        graph.inputs = [graph.node("Flatten", f"{n}/rows", n, axis=2) for n in INPUTS]
    hidden = _embeddings(graph)
    mask = _mask(graph)
    for number in range(config.num_hidden_layers):
        hidden = _layer(graph, f"bert.encoder.layer.{number}", hidden, mask)
    if is_choice:
        _choices(graph, hidden)
        return graph
    graph.output("last_hidden_state", hidden, [BATCH, LENGTH, config.hidden_size])
    _heads(graph, state, hidden, architecture == TOKENS)
    return graph


def _embeddings(graph: Graph) -> str:
    name, positions = "bert.embeddings", graph.config.max_position_embeddings
    words = graph.node("Gather", f"{name}/words", graph.weight(WORD_EMBEDDINGS), graph.inputs[0])
    types = graph.weight(f"{name}.token_type_embeddings.weight")
    types = graph.node("Gather", f"{name}/types", types, graph.inputs[2])
    shape = graph.node("Shape", f"{name}/Shape", graph.inputs[0])
    length = graph.node("Gather", f"{name}/length", shape, graph.constant("constant/1", 1), axis=0)
    zero, one = graph.constant("constant/[0]", [0]), graph.constant("constant/[1]", [1])
    end = graph.node("Unsqueeze", f"{name}/end", length, zero)
    ids = graph.constant("constant/position_ids", np.arange(positions)[None])
    ids = graph.node("Slice", f"{name}/position_ids", ids, zero, end, one, one)
    places = graph.weight(f"{name}.position_embeddings.weight")
    places = graph.node("Gather", f"{name}/positions", places, ids)
    summed = graph.node("Add", f"{name}/Add", words, types)
    summed = graph.node("Add", f"{name}/Add_1", summed, places)
    return graph.layer_norm(f"{name}.LayerNorm", summed)


def _mask(graph: Graph) -> str:
    """[B, S] of 1 and 0 -> [B, 1, 1, S] of 0 and MASKED."""
    first = graph.node(
        "Unsqueeze", "mask/Unsqueeze", graph.inputs[1], graph.constant("constant/[1]", [1])
    )
    both = graph.node("Unsqueeze", "mask/Unsqueeze_1", first, graph.constant("constant/[2]", [2]))
    kept = graph.node("Cast", "mask/Cast", both, to=TensorProto.FLOAT)
    left_out = graph.node("Sub", "mask/Sub", graph.constant("constant/one", 1, np.float32), kept)
    lowest = graph.constant("constant/masked", MASKED, np.float32)
    return graph.node("Mul", "mask/Mul", left_out, lowest)


def _layer(graph: Graph, name: str, hidden: str, mask: str) -> str:
    config, attention = graph.config, f"{name}.attention"
    heads, size = config.num_attention_heads, config.hidden_size
    split = graph.constant("constant/split", [0, 0, heads, size // heads])
    joined = graph.constant("constant/joined", [0, 0, size])
    parts = {}
    for part, order in (("query", [0, 2, 1, 3]), ("key", [0, 2, 3, 1]), ("value", [0, 2, 1, 3])):
        place = f"{attention}.self.{part}"
        parts[part] = graph.node("Reshape", f"{place}/Reshape", graph.dense(place, hidden), split)
        parts[part] = graph.node("Transpose", f"{place}/Transpose", parts[part], perm=order)
    here = f"{attention}.self"
    root = graph.constant("constant/root", math.sqrt(size // heads), np.float32)
    scores = graph.node("MatMul", f"{here}/scores", parts["query"], parts["key"])
    scores = graph.node("Add", f"{here}/Add", graph.node("Div", f"{here}/Div", scores, root), mask)
    weights = graph.node("Softmax", f"{here}/Softmax", scores, axis=-1)
    context = graph.node("MatMul", f"{here}/context", weights, parts["value"])
    context = graph.node("Transpose", f"{here}/Transpose", context, perm=[0, 2, 1, 3])
    context = graph.node("Reshape", f"{here}/Reshape", context, joined)
    projected = graph.dense(f"{attention}.output.dense", context)
    summed = graph.node("Add", f"{attention}.output/Add", projected, hidden)
    attended = graph.layer_norm(f"{attention}.output.LayerNorm", summed)
    inner = graph.dense(f"{name}.intermediate.dense", attended)
    inner = graph.gelu(f"{name}.intermediate/gelu", inner)
    summed = graph.dense(f"{name}.output.dense", inner)
    summed = graph.node("Add", f"{name}.output/Add", summed, attended)
    return graph.layer_norm(f"{name}.output.LayerNorm", summed)


def _heads(graph: Graph, state: StateDict, hidden: str, is_per_token: bool) -> None:
    config, is_classifier = graph.config, CLASSIFIER_WEIGHT in state
    if PREDICTION_BIAS in state:
        # A classifier's output is called "logits" everywhere, and so is that of the MLM head.
        name = "prediction_logits" if is_classifier else "logits"
        graph.output(name, _predictions(graph, state, hidden), [BATCH, LENGTH, config.vocab_size])
    if is_classifier and is_per_token:
        graph.output("logits", graph.dense("classifier", hidden), [BATCH, LENGTH, _rows(state)])
    if QA_WEIGHT in state:
        both = graph.dense("qa_outputs", hidden)  # [B, S, 2]
        for number, name in enumerate(("start_logits", "end_logits")):
            place = graph.constant(f"constant/{number}", number)
            one = graph.node("Gather", f"qa_outputs/{name}", both, place, axis=2)
            graph.output(name, one, [BATCH, LENGTH])
    if POOLER_WEIGHT not in state:
        return
    pooled = _pooled(graph, hidden)
    graph.output("pooler_output", pooled, [BATCH, config.hidden_size])
    if NEXT_SENTENCE_WEIGHT in state:
        logits = graph.dense("cls.seq_relationship", pooled)
        graph.output("seq_relationship_logits", logits, [BATCH, 2])
    if is_classifier and not is_per_token:
        graph.output("logits", graph.dense("classifier", pooled), [BATCH, _rows(state)])


def _pooled(graph: Graph, hidden: str) -> str:
    first = graph.constant("constant/0", 0)
    first = graph.node("Gather", "bert.pooler/first", hidden, first, axis=1)
    return graph.node("Tanh", "bert.pooler/Tanh", graph.dense("bert.pooler.dense", first))


def _choices(graph: Graph, hidden: str) -> None:
    """One logit for each choice, [B, choices]; nothing else keeps a meaning by sequence."""
    rated = graph.dense("classifier", _pooled(graph, hidden))  # [B * choices, 1]
    shape = graph.node("Shape", "choices/Shape", INPUTS[0])
    shape = graph.node("Gather", "choices/size", shape, graph.constant("constant/[0,1]", [0, 1]))
    graph.output("logits", graph.node("Reshape", "choices/Reshape", rated, shape), [BATCH, CHOICES])


def _rows(state: StateDict) -> int:
    return len(state[CLASSIFIER_BIAS])


def _predictions(graph: Graph, state: StateDict, hidden: str) -> str:
    """The MLM head; tied words are stored once and turned by the reader."""
    name = "cls.predictions"
    hidden = graph.dense(f"{name}.transform.dense", hidden)
    hidden = graph.gelu(f"{name}.transform/gelu", hidden)
    hidden = graph.layer_norm(f"{name}.transform.LayerNorm", hidden)
    if is_tied(state, DECODER_WEIGHT):
        words = graph.weight(WORD_EMBEDDINGS)
        words = graph.node("Transpose", f"{name}/words", words, perm=[1, 0])
        bias = graph.weight(PREDICTION_BIAS)
    else:
        words = graph.weight(DECODER_WEIGHT, True)
        bias = graph.weight(DECODER_BIAS if DECODER_BIAS in state else PREDICTION_BIAS)
    return graph.node(
        "Add", f"{name}/Add", graph.node("MatMul", f"{name}/MatMul", hidden, words), bias
    )
