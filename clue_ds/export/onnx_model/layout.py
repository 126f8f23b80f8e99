"""The whole network as one ONNX file for any batch size and length, compared with PyTorch.

    model.onnx  config.json  vocab.txt  tokenizer.json  tokenizer_config.json
    model_quantized.onnx                                    with `--quantize int8`

Inputs: input_ids, attention_mask, token_type_ids, int64 [batch, length]. Outputs, if the model has
the weights for them: last_hidden_state [batch, length, H], pooler_output [batch, H], logits, which
are a classifier's [batch, labels] ([batch, length, labels] of one that classifies tokens) or else
the MLM head's [batch, length, V], and seq_relationship_logits [batch, 2]; of a model that answers
questions start_logits and end_logits [batch, length]. A model of multiple choice takes int64
[batch, choices, length] and has one output, logits [batch, choices]. config.json has the labels.

Guarantees: before the directory is published, onnxruntime computes a padded batch, and its outputs
agree with PyTorch's to 1e-4.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from clue_ds.errors import UserError
from clue_ds.export import huggingface
from clue_ds.export.onnx_model import DEFAULT_OPSET
from clue_ds.export.publish import (
    check_state,
    copy_vocab,
    read_tokens,
    staged,
    write_model_json,
)
from clue_ds.model.bert import BertForPreTraining
from clue_ds.model.finetuned import ENTITY_POINTER, MULTIPLE_CHOICE, TOKENS, FineTuned
from clue_ds.model.weights import (
    CLASSIFIER_BIAS,
    CLASSIFIER_WEIGHT,
    DECODER_BIAS,
    DECODER_WEIGHT,
    POOLER_WEIGHT,
    PREDICTION_BIAS,
    QA_BIAS,
    QA_WEIGHT,
    TASK_HEADS,
    StateDict,
    is_tied,
)
from clue_ds.presets import ModelConfig
from clue_ds.vocab_file import TOKENIZER_CONFIG

if TYPE_CHECKING:
    import onnxruntime

FILE = "model.onnx"
NEEDED = ("onnx", "onnxruntime")
# fp32 sums in another order: 4e-6 off on small models, a few 1e-5 on 24 layers.
TOLERANCE = 1e-4


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
    opset: int = DEFAULT_OPSET,
    quantized_on: Path | None = None,
) -> Path:
    """Write the directory; arguments, guarantees and errors are those of huggingface.write.

    `quantized_on`: a file of texts; the int8 model is written too, and measured on them.
    """
    check_installed()
    from clue_ds.export.onnx_model import file, graph, quantize

    file.check_opset(opset)
    directory = Path(directory)
    tokens = read_tokens(vocab_file, config.vocab_size)
    check_state(config, state, finetuned)
    architecture = _architecture(finetuned)
    if quantized_on is not None and architecture == MULTIPLE_CHOICE:
        raise UserError("--quantize can't compare the answers of multiple choice; leave it out")
    with staged(directory, force) as place:
        place.mkdir()
        file.save(graph.build(config, state, architecture), state, place / FILE, opset)
        _check(config, state, architecture, place / FILE)
        huggingface.fast_tokenizer(tokens, lower_case).save(str(place / "tokenizer.json"))
        tokenizer = huggingface.tokenizer_config(config, lower_case, finetuned)
        write_model_json(place / TOKENIZER_CONFIG, tokenizer)
        values = huggingface.config_json(config, state, finetuned)
        write_model_json(place / "config.json", values)
        copy_vocab(vocab_file, place)
        if quantized_on is not None:
            found = quantize.write(place, quantized_on, tokenizer["model_max_length"])
            print(quantize.sentence(found))
    return directory


def _architecture(finetuned: FineTuned | None) -> str | None:
    """Which classifier it is; UserError for one that the graph can't express."""
    if finetuned is not None and finetuned.architecture == ENTITY_POINTER:
        raise UserError(
            "the layout onnx has no place for the head `pointer`, which only clue_ds reads; export "
            "it with --to hf, or fine-tune the task with `head: softmax`"
        )
    return finetuned.architecture if finetuned is not None else None


def batch(config: ModelConfig, rows: int, length: int) -> dict[str, np.ndarray]:
    """Ids from the whole vocabulary, two segments, and a last sequence that is half padding."""
    length = min(length, config.max_position_embeddings)
    ids = np.arange(rows * length).reshape(rows, length) * 7 % config.vocab_size
    mask = np.ones_like(ids)
    mask[-1, length // 2 + 1 :] = 0
    types = np.broadcast_to(np.arange(length) > length // 3, ids.shape).astype(np.int64)
    types = np.minimum(types, config.type_vocab_size - 1)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def session(path: Path) -> onnxruntime.InferenceSession:
    """An onnxruntime session that is made for a few batches, and so keeps no second copy."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _check(config: ModelConfig, state: StateDict, architecture: str | None, path: Path) -> None:
    inputs = batch(config, 3, 13)
    expected = _computed(config, state, architecture, inputs)
    if architecture == MULTIPLE_CHOICE:  # the three texts are the choices of one question
        inputs = {name: value[None] for name, value in inputs.items()}
        expected["logits"] = expected["logits"].T
    opened = session(path)
    names = [output.name for output in opened.get_outputs()]
    for name, found in zip(names, opened.run(names, inputs), strict=True):
        right = expected[name].numpy()
        difference = float(np.abs(found - right).max())
        bound = TOLERANCE * max(1.0, float(np.abs(right).max()))
        assert difference <= bound, (
            f"{name} of {path.name} differs from PyTorch's by {difference:.1e}"
        )


@torch.no_grad()
def _computed(
    config: ModelConfig, state: StateDict, architecture: str | None, inputs: dict[str, Any]
) -> dict[str, Tensor]:
    """Every output by its name, computed by PyTorch from the tensors of `state` themselves."""
    with torch.device("meta"):
        model = BertForPreTraining(config)
    model.load_state_dict(
        {n: t.detach().float() for n, t in state.items() if not n.startswith(TASK_HEADS)},
        strict=False,
        assign=True,
    )
    model.eval()
    ids, mask, types = (torch.from_numpy(value) for value in inputs.values())
    bert, heads = model.bert, model.cls
    hidden = bert.encoder(bert.embeddings(ids, types), mask.bool()[:, None, None, :], None)
    found = {"last_hidden_state": hidden}
    if PREDICTION_BIAS in state:
        transformed = heads.predictions.transform(hidden)
        bias = state.get(DECODER_BIAS, state[PREDICTION_BIAS])
        tied = is_tied(state, DECODER_WEIGHT)
        words = bert.embeddings.word_embeddings.weight if tied else state[DECODER_WEIGHT].float()
        found["logits"] = found["prediction_logits"] = transformed @ words.T + bias.float()
    if POOLER_WEIGHT in state:
        found["pooler_output"] = bert.pooler(hidden[:, 0])
        if "cls.seq_relationship.weight" in state:
            found["seq_relationship_logits"] = heads.seq_relationship(found["pooler_output"])
    if QA_WEIGHT in state:
        both = hidden @ state[QA_WEIGHT].float().T + state[QA_BIAS].float()
        found["start_logits"], found["end_logits"] = both.unbind(-1)
    if CLASSIFIER_WEIGHT in state:
        weight, bias = state[CLASSIFIER_WEIGHT].float(), state[CLASSIFIER_BIAS].float()
        found["logits"] = (
            hidden if architecture == TOKENS else found["pooler_output"]
        ) @ weight.T + bias
    return found
