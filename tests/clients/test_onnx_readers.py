"""Other people's programs answer from our exports what we do: onnxruntime, optimum, MNN.

`make test-clients` runs it with the Pythons of their environments: ONNXRUNTIME114_PYTHON (with a
Python 3.7), ONNXRUNTIME116_PYTHON, and TRANSFORMERS4_PYTHON, which has optimum and MNN.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from models import random_model, without, write_vocab

from clue_ds import export
from clue_ds.model import finetuned
from clue_ds.presets import ModelConfig
from clue_ds.tasks import Predictor, registry

CONFIG = ModelConfig(
    vocab_size=120,
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=96,
    max_position_embeddings=24,
)
TEXTS = [chr(0x4E00 + i) * (1 + i % 9) + "一丁七"[: i % 4] for i in range(60)]
TOLERANCE = 2e-5  # fp32 in another order of operations, logits up to 10
MNN_TOLERANCE = 1e-2  # MNN approximates exp and erf; measured 4e-3 on logits up to 14
LABELS = registry.TASKS["tnews"].labels

RUNTIME = """
import json, sys
import numpy as np, onnxruntime
providers = ["CPUExecutionProvider"]
session = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx", providers=providers)
ids = np.array(json.loads(sys.argv[2]), dtype=np.int64)
feed = {"input_ids": ids, "attention_mask": np.minimum(ids, 1), "token_type_ids": ids * 0}
print(json.dumps(session.run(["logits"], feed)[0].tolist()))
"""
MNN = """
import json, subprocess, sys
import numpy as np
import MNN.expr as F, MNN.nn as nn
onnx, model = sys.argv[1] + "/model.onnx", sys.argv[1] + "/model.mnn"
convert = "import sys; from MNN.tools.mnnconvert import main; main()"
words = ["-f", "ONNX", "--modelFile", onnx, "--MNNModel", model, "--bizCode", "test"]
subprocess.run([sys.executable, "-c", convert, *words], check=True, stdout=sys.stderr)
net = nn.load_module_from_file(model, ["input_ids", "attention_mask", "token_type_ids"], ["logits"])
ids = np.array(json.loads(sys.argv[2]))
inputs = [
    F.const(one.astype(np.int32).ravel().tolist(), list(one.shape), F.NCHW, F.int)
    for one in (ids, np.minimum(ids, 1), ids * 0)
]
found = np.array(net.forward(inputs)[0].read()).reshape(len(ids), -1)
print()
print(json.dumps(found.tolist()))
"""
OPTIMUM = """
import json, sys
from optimum.onnxruntime import ORTModelForSequenceClassification
from transformers import AutoTokenizer, pipeline
model = ORTModelForSequenceClassification.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ask = pipeline("text-classification", model=model, tokenizer=tokenizer)
print(json.dumps(ask(json.loads(sys.argv[2]))))
"""
PIPELINE = """
import json, sys
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ask = pipeline("sentiment-analysis", model=model, tokenizer=tokenizer)
answers = [ask(text)[0] for text in json.loads(sys.argv[2])]
print(json.dumps([{key: str(value) for key, value in answer.items()} for answer in answers]))
"""


def run(variable: str, code: str, directory: Path, argument: object) -> list[dict[str, str]]:
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"{variable} is not set: `make test-clients` had no Python for it")
    # Not resolved: an environment's python is a link.
    command = [str(Path(python).absolute()), "-c", code, str(directory), json.dumps(argument)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of TNEWS' shape, as hf/ and onnx/."""
    folder = tmp_path_factory.mktemp("classifier")
    vocab_file = write_vocab(folder / "vocab.txt", CONFIG.vocab_size)
    state = without(dict(random_model(CONFIG, 0).state_dict()), "cls.")
    torch.manual_seed(1)
    state["classifier.weight"] = torch.randn(len(LABELS), CONFIG.hidden_size)
    state["classifier.bias"] = torch.randn(len(LABELS))
    names = {label: f"news_{label}" for label in LABELS}
    about = finetuned.describe(LABELS, names, task="tnews", max_length=16)
    options = {"finetuned": about}
    export.save(CONFIG, state, vocab_file, folder / "hf", legacy=True, **options)
    export.save(CONFIG, state, vocab_file, folder / "onnx", to="onnx", **options)
    return folder


@pytest.mark.parametrize("variable", ["ONNXRUNTIME114_PYTHON", "ONNXRUNTIME116_PYTHON"])
def test_old_onnxruntime_computes_the_same(variable: str, classifier: Path) -> None:
    import onnxruntime

    ids = np.arange(5, 35).reshape(3, 10)
    found = run(variable, RUNTIME, classifier / "onnx", ids.tolist())
    session = onnxruntime.InferenceSession(str(classifier / "onnx" / "model.onnx"))
    feed = {"input_ids": ids, "attention_mask": np.minimum(ids, 1), "token_type_ids": ids * 0}
    (expected,) = session.run(["logits"], feed)
    np.testing.assert_allclose(np.array(found), expected, atol=TOLERANCE)


def test_mnn_converts_the_file_and_computes_the_same(classifier: Path) -> None:
    import onnxruntime

    ids = np.arange(5, 35).reshape(3, 10)
    ids[2, 6:] = 0
    found = run("TRANSFORMERS4_PYTHON", MNN, classifier / "onnx", ids.tolist())
    session = onnxruntime.InferenceSession(str(classifier / "onnx" / "model.onnx"))
    feed = {"input_ids": ids, "attention_mask": np.minimum(ids, 1), "token_type_ids": ids * 0}
    (expected,) = session.run(["logits"], feed)
    np.testing.assert_allclose(np.array(found), expected, atol=MNN_TOLERANCE)


def check(answers: list[dict[str, str]], directory: Path) -> None:
    predictor = Predictor(directory)
    for answer, right in zip(answers, predictor.predict(TEXTS), strict=True):
        assert answer["label"] == predictor.names[right.label]
        assert float(answer["score"]) == pytest.approx(right.probabilities[right.label], abs=1e-5)


def test_optimum_answers_the_same(classifier: Path) -> None:
    check(run("TRANSFORMERS4_PYTHON", OPTIMUM, classifier / "onnx", TEXTS), classifier / "hf")


@pytest.mark.parametrize("number", ["2", "3", "4"])
def test_pipelines_of_transformers_answer_the_same(number: str, classifier: Path) -> None:
    """transformers 2.5.1, 3.5.1 and 4.57; tests/test_finetuned.py has 5.x."""
    found = run(f"TRANSFORMERS{number}_PYTHON", PIPELINE, classifier / "hf", TEXTS)
    check(found, classifier / "hf")
