"""The whole network as one ONNX file for any batch size and length, compared with PyTorch.

    model.onnx  config.json  vocab.txt  tokenizer.json  tokenizer_config.json

Inputs: input_ids, attention_mask, token_type_ids, int64 [batch, length]. Outputs, if the model has
the weights for them: last_hidden_state [batch, length, H], pooler_output [batch, H], logits of the
MLM head [batch, length, V], seq_relationship_logits [batch, 2], classifier_logits [batch, labels].

Guarantees: before the directory is published, onnxruntime computes a padded batch of a size and a
length that the exporter never saw, and its outputs agree with PyTorch's to 1e-4.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from clue_ds.errors import UserError
from clue_ds.export import huggingface
from clue_ds.export.publish import (
    check_state,
    copy_vocab,
    read_tokens,
    staged,
    write_model_json,
)
from clue_ds.model.bert import BertForPreTraining
from clue_ds.model.finetuned import FineTuned
from clue_ds.model.weights import (
    CLASSIFIER_BIAS,
    CLASSIFIER_WEIGHT,
    NEXT_SENTENCE_WEIGHT,
    POOLER_WEIGHT,
    PREDICTION_BIAS,
    StateDict,
    load_into,
)
from clue_ds.presets import ModelConfig
from clue_ds.vocab_file import TOKENIZER_CONFIG

FILE = "model.onnx"
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
NEEDED = ("onnx", "onnxscript", "onnxruntime")
# fp32 sums in another order: 4e-6 off on small models, a few 1e-5 on 24 layers.
TOLERANCE = 1e-4
PROTOBUF_LIMIT = 2**31 - 2**24  # a larger model keeps its weights in a file beside model.onnx


class Network(nn.Module):
    """Computes every output that `state` has weights for, without branching on tensor values."""

    def __init__(self, config: ModelConfig, state: StateDict, where: Path) -> None:
        super().__init__()
        self.model = BertForPreTraining(config)
        load_into(self.model, config, state, where)
        outputs = ["last_hidden_state"]
        if PREDICTION_BIAS in state:
            outputs.append("logits")
        if POOLER_WEIGHT in state:
            outputs.append("pooler_output")
            if NEXT_SENTENCE_WEIGHT in state:
                outputs.append("seq_relationship_logits")
            if CLASSIFIER_WEIGHT in state:
                outputs.append("classifier_logits")
                num_labels, hidden_size = state[CLASSIFIER_WEIGHT].shape
                self.classifier = nn.Linear(hidden_size, num_labels)
                weights = {"weight": state[CLASSIFIER_WEIGHT], "bias": state[CLASSIFIER_BIAS]}
                self.classifier.load_state_dict(weights)
        self.outputs = outputs
        self.eval()

    def forward(self, ids: Tensor, mask: Tensor, types: Tensor) -> tuple[Tensor, ...]:
        bert, heads = self.model.bert, self.model.cls
        keep = mask.bool()[:, None, None, :]
        hidden = bert.encoder(bert.embeddings(ids, types), keep, None)
        pooled = bert.pooler(hidden[:, 0])
        found = {"last_hidden_state": hidden, "pooler_output": pooled}
        if "logits" in self.outputs:
            found["logits"] = heads.predictions(hidden)
        if "seq_relationship_logits" in self.outputs:
            found["seq_relationship_logits"] = heads.seq_relationship(pooled)
        if "classifier_logits" in self.outputs:
            found["classifier_logits"] = self.classifier(pooled)
        return tuple(found[name] for name in self.outputs)


def check_installed() -> None:
    """UserError when a package of the extra clue_ds[onnx] is missing."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--to onnx needs {', '.join(missing)}: pip install 'clue_ds[onnx]', or choose hf or tf"
        )


def write(
    config: ModelConfig,
    state: StateDict,
    vocab_file: str | Path,
    directory: str | Path,
    lower_case: bool = True,
    force: bool = False,
    finetuned: FineTuned | None = None,
) -> Path:
    """Write the directory; arguments, guarantees and errors are those of huggingface.write."""
    check_installed()
    directory = Path(directory)
    tokens = read_tokens(vocab_file, config.vocab_size)
    check_state(config, state, finetuned)
    with staged(directory, force) as place:
        place.mkdir()
        network = Network(config, state, directory)
        _export(network, config, place / FILE)
        _check(network, config, place / FILE)
        huggingface.fast_tokenizer(tokens, lower_case).save(str(place / "tokenizer.json"))
        tokenizer = huggingface.tokenizer_config(config, lower_case, finetuned)
        write_model_json(place / TOKENIZER_CONFIG, tokenizer)
        values = huggingface.config_json(config, state, finetuned)
        write_model_json(place / "config.json", values)
        copy_vocab(vocab_file, place)
    return directory


def _batch(config: ModelConfig, batch: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids from the whole vocabulary, two segments, and a last sequence that is half padding."""
    length = min(length, config.max_position_embeddings)
    ids = torch.arange(batch * length).reshape(batch, length) * 7 % config.vocab_size
    mask = torch.ones_like(ids)
    mask[-1, length // 2 + 1 :] = 0
    types = (torch.arange(length) > length // 3).long().expand(batch, -1)
    return ids, mask, types.clamp(max=config.type_vocab_size - 1).contiguous()


def _export(network: Network, config: ModelConfig, path: Path) -> None:
    length = torch.export.Dim("length", min=1, max=config.max_position_embeddings)
    axes = {0: torch.export.Dim("batch", min=1), 1: length}
    size = sum(4 * parameter.numel() for parameter in network.parameters())
    with warnings.catch_warnings():
        # The exporter warns about its own internals; its result is compared in _check.
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            network,
            _batch(config, 2, 7),
            dynamo=True,
            verbose=False,
            input_names=list(INPUTS),
            output_names=network.outputs,
            dynamic_shapes=(axes, axes, axes),
        )
    assert program is not None
    program.save(str(path), external_data=size > PROTOBUF_LIMIT)


def _check(network: Network, config: ModelConfig, path: Path) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    batch = _batch(config, 3, 13)
    found = session.run(None, {name: t.numpy() for name, t in zip(INPUTS, batch, strict=True)})
    with torch.no_grad():
        expected = network(*batch)
    for name, one, other in zip(network.outputs, found, expected, strict=True):
        difference = float((torch.from_numpy(one) - other).abs().max())
        bound = TOLERANCE * max(1.0, float(other.abs().max()))
        assert difference <= bound, (
            f"{name} of {path.name} differs from PyTorch's by {difference:.1e}"
        )
