"""Other versions of transformers, and sentence-transformers, read our Hugging Face directory.

`make test-clients` runs it with the Pythons of their environments: TRANSFORMERS4_PYTHON, and
TRANSFORMERS2_PYTHON where a Python 3.7 was found (transformers 2.5.1 on torch 1.4, which upstream's
README names).
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from models import random_model, write_vocab

from clue_ds import export
from clue_ds.export import huggingface
from clue_ds.model.finetuned import FineTuned
from clue_ds.presets import ModelConfig
from clue_ds.tasks import Predictor, kinds, registry
from clue_ds.tasks.kinds import Example

CONFIG = ModelConfig(
    vocab_size=120,
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=96,
    hidden_act="gelu_new",
    max_position_embeddings=24,
)
TEXT = "一丁七 万丈AB三"
TOLERANCE = 2e-5  # fp32 in another order of operations, logits up to 10; measured 4e-6

TRANSFORMERS = """
import json, sys, torch
from transformers import BertForPreTraining, BertTokenizer
tokenizer = BertTokenizer.from_pretrained(sys.argv[1])
model = BertForPreTraining.from_pretrained(sys.argv[1]).eval()
ids = tokenizer.encode(sys.argv[2])
with torch.no_grad():
    logits, relationship = model(torch.tensor([ids]))[:2]
print(json.dumps({"ids": ids, "logits": logits.tolist(), "nsp": relationship.tolist()}))
"""
SENTENCES = """
import json, sys
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu")
print(json.dumps(model.encode([sys.argv[2]]).tolist()))
"""
QUESTIONS = """
import json, sys
from transformers import pipeline
ask = pipeline("question-answering", model=sys.argv[1])
found = [
    ask(question=question, context=context, align_to_words=False, max_answer_len=50)
    for question, context in json.loads(sys.argv[2])
]
print(json.dumps([{name: one[name] for name in ("answer", "start", "end")} for one in found]))
"""


def run(variable: str, code: str, directory: Path, text: str = TEXT) -> str:
    """The last line that the reader printed."""
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"{variable} is not set: `make test-clients` had no Python for it")
    # Not resolved: an environment's python is a link.
    command = [str(Path(python).absolute()), "-c", code, str(directory), text]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readers")
    vocab_file = write_vocab(folder / "vocab.txt", CONFIG.vocab_size)
    state = random_model(CONFIG, 0).state_dict()
    return export.save(CONFIG, state, vocab_file, folder / "hf", legacy=True)


def expected_ids() -> list[int]:
    """[CLS] 一丁七 万丈 [UNK] 三 [SEP]; write_vocab's characters begin at id 5."""
    return [2, *(ord(c) - 0x4E00 + 5 if c >= chr(0x4E00) else 1 for c in "一丁七万丈A三"), 3]


@pytest.mark.parametrize("variable", ["TRANSFORMERS4_PYTHON", "TRANSFORMERS2_PYTHON"])
def test_older_transformers_compute_the_same(variable: str, directory: Path) -> None:
    found = json.loads(run(variable, TRANSFORMERS, directory))
    assert found["ids"] == expected_ids()
    with torch.no_grad():
        expected = random_model(CONFIG, 0)(torch.tensor([expected_ids()]))
    for name, value in (
        ("logits", expected.prediction_logits),
        ("nsp", expected.seq_relationship_logits),
    ):
        torch.testing.assert_close(torch.tensor(found[name]), value, atol=TOLERANCE, rtol=0)


def test_sentence_transformers_takes_the_directory(directory: Path) -> None:
    found = torch.tensor(json.loads(run("TRANSFORMERS4_PYTHON", SENTENCES, directory)))
    with torch.no_grad():
        hidden = random_model(CONFIG, 0).bert(torch.tensor([expected_ids()]))
    torch.testing.assert_close(found, hidden.mean(1), atol=TOLERANCE, rtol=0)


def test_the_question_answering_pipeline_answers_the_same(tmp_path: Path) -> None:
    """Of transformers 4; transformers 5 has no such pipeline. The texts fit into one window."""
    config = CONFIG.replace(max_position_embeddings=64)
    vocab_file = write_vocab(tmp_path / "vocab.txt", config.vocab_size)
    kind = kinds.of(registry.get("cmrc2018"))
    state = kind.network(config, 3).state_dict()
    state["qa_outputs.weight"] *= 50  # else all spans have nearly the same score
    about = FineTuned((), task="cmrc2018", architecture=kind.architecture)
    huggingface.write(config, state, vocab_file, tmp_path / "hf", finetuned=about)
    asked = [
        ("一丁？", "丂七丄丅 丆万丈三"),
        ("七?", "  上下\u3000丌不与AB丏\u200b丐丑 "),
        ("丈三", "丒专且丕世丗丘丙业丛东丝" * 3),
    ]
    found = json.loads(run("TRANSFORMERS4_PYTHON", QUESTIONS, tmp_path / "hf", json.dumps(asked)))
    examples = [Example(0, kind.plain(one, ""), None) for one in asked]
    answers = Predictor(tmp_path / "hf").answers(examples)
    ours = [{n: one.details[n] for n in ("answer", "start", "end")} for one in answers]
    assert found == ours


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_sentence_transformers_pools_as_the_directory_says(pooling: str, directory: Path) -> None:
    there = directory.parent / pooling
    vocab_file = directory / "vocab.txt"
    state = random_model(CONFIG, 0).state_dict()
    export.save(CONFIG, state, vocab_file, there, pooling=pooling)  # type: ignore[arg-type]
    found = torch.tensor(json.loads(run("TRANSFORMERS4_PYTHON", SENTENCES, there)))
    with torch.no_grad():
        hidden = random_model(CONFIG, 0).bert(torch.tensor([expected_ids()]))
    expected = hidden.mean(1) if pooling == "mean" else hidden[:, 0]
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
