"""transformers 4 answers what we do with the heads for questions, entities and choices.

`make test-clients` runs it with TRANSFORMERS4_PYTHON; tests/ has the same for transformers 5. The
weights are random and large, so that answers differ from one another.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from models import write_vocab
from test_pytorch_readers import CONFIG, run

from clue_ds.export import huggingface
from clue_ds.model.finetuned import FineTuned
from clue_ds.model.weights import TASK_HEADS
from clue_ds.tasks import Predictor, kinds, registry
from clue_ds.tasks.kinds import Example
from clue_ds.tasks.kinds.choice import Question

ENTITIES = """
import json, sys
from transformers import pipeline
ask = pipeline("token-classification", model=sys.argv[1], aggregation_strategy="simple")
keys = ("entity_group", "start", "end", "score")
found = [[[one[key] for key in keys] for one in ask(text)] for text in json.loads(sys.argv[2])]
print(json.dumps(found, default=float))
"""
CHOICES = """
import json, sys, torch
from transformers import AutoModelForMultipleChoice, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForMultipleChoice.from_pretrained(sys.argv[1]).eval()
found = []
for context, question, choices in json.loads(sys.argv[2]):
    texts = [f"{question}[SEP]{choice}" for choice in choices]
    batch = tokenizer([context] * len(texts), texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**{name: tensor[None] for name, tensor in batch.items()}).logits[0]
    found.append(logits.softmax(-1).tolist())
print(json.dumps(found))
"""
TEXTS = [
    "一丁丂七丄丅丆万丈三上下",
    "丌 不与　AB丏\u200b丐丑丒专 且丕世",
    "丗丘丙业,丛东丝。丞丟" * 2,
]
QUESTIONS = [
    ("一丁七万丈", "丌不？", ("丏丐", "丑丒专", "且")),
    ("丗 丘AB", "丙", ("业丛东丝", "丞")),
]


def random_model_of(task: str, place: Path, scale: float) -> Path:
    """A model of one of CLUE's tasks with random weights, those of the head times `scale`."""
    config = CONFIG.replace(max_position_embeddings=64)
    vocab_file = write_vocab(place / "vocab.txt", config.vocab_size)
    kind = kinds.of(registry.get(task))
    state = dict(kind.network(config, 3).state_dict())
    state |= {name: t * scale for name, t in state.items() if name.startswith(TASK_HEADS)}
    about = FineTuned(kind.task.labels, task=task, architecture=kind.architecture)
    return huggingface.write(config, state, vocab_file, place / "hf", finetuned=about)


def test_the_token_classification_pipeline_finds_the_same_entities(tmp_path: Path) -> None:
    directory = random_model_of("cluener", tmp_path, 50)
    found = json.loads(run("TRANSFORMERS4_PYTHON", ENTITIES, directory, json.dumps(TEXTS)))
    answers = Predictor(directory).answers([Example(0, text, None) for text in TEXTS])
    assert sum(map(len, found)) >= 6, "the random weights find too little to compare"
    for theirs, answer in zip(found, answers, strict=True):
        ours = [[e["type"], e["start"], e["end"], e["score"]] for e in answer.details["entities"]]
        assert [one[:3] for one in ours] == [one[:3] for one in theirs]
        assert [one[3] for one in ours] == pytest.approx([one[3] for one in theirs], abs=1e-4)


def test_the_model_for_multiple_choice_gives_the_same_probabilities(tmp_path: Path) -> None:
    directory = random_model_of("c3", tmp_path, 3000)
    found = json.loads(run("TRANSFORMERS4_PYTHON", CHOICES, directory, json.dumps(QUESTIONS)))
    examples = [Example(0, Question(*one), None) for one in QUESTIONS]
    for theirs, answer in zip(found, Predictor(directory).answers(examples), strict=True):
        assert answer.details["probabilities"] == pytest.approx(theirs, abs=1e-5)
        assert max(theirs) - min(theirs) > 1e-3
