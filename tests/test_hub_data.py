"""CLUE's tasks by `--data hub`: `datasets` itself, against a hub of our own on loopback."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback_hub import Hub, serving
from models import TINY_CONFIG, random_model, write_vocab

from clue_ds import export
from clue_ds.data import Corpus
from clue_ds.errors import UserError
from clue_ds.tasks import hub_data, registry

ROWS = [
    {"sentence1": "甲", "sentence2": "乙", "label": 1, "idx": 0},
    {"sentence1": "丙", "sentence2": "丁", "label": -1, "idx": 1},
    {"sentence1": "戊", "sentence2": "己", "label": 0, "idx": 2},
]
QUESTIONS = [
    {
        "id": "TRAIN_186_QUERY_0",
        "question": "谁?",
        "context": "光荣在东京",
        "answers": {"text": ["光荣"], "answer_start": [0]},
    }
]
# A row of other tasks as clue/clue has it, and what we read of it.
IDIOMS = [f"#idiom{number:06}#" for number in (3, 4)]
OTHERS: dict[str, tuple[dict[str, object], list[object]]] = {
    "drcd": (
        {
            **QUESTIONS[0],
            "context": "光榮在東京",
            "answers": {"text": ["東京"], "answer_start": [2]},
        },
        ["TRAIN_186_QUERY_0", ["谁?", "光榮在東京"], [["東京"], 3, 5]],
    ),
    "c3": (
        {
            "id": 7,
            "context": ["甲", "乙"],
            "question": "谁",
            "choice": ["丙", "丁"],
            "answer": "丁",
        },
        [7, ["甲\n乙", "谁", ["丙", "丁"]], 1],
    ),
    "chid": (
        {
            "idx": 2,
            "candidates": ["三心二意", "一心一意", "全心全意"],
            "content": [f"他{IDIOMS[0]}，她{IDIOMS[1]}。"],
            "answers": {"text": ["全心全意", "三心二意"], "candidate_id": [2, 0]},
        },
        [
            2,
            [
                ["三心二意", "一心一意", "全心全意"],
                [f"他{IDIOMS[0]}，她{IDIOMS[1]}。"],
                [[IDIOMS[0], 0, 1, 14], [IDIOMS[1], 0, 16, 29]],
            ],
            {IDIOMS[0]: 2, IDIOMS[1]: 0},
        ],
    ),
    "csl": (
        {"idx": 5, "corpus_id": 1, "abst": "摘要", "label": 1, "keyword": ["甲", "乙"]},
        [5, ["甲 乙", "摘要"], "1"],
    ),
    "cluewsc2020": (
        {
            "idx": 6,
            "text": "小明说他饿了",
            "label": 0,
            "target": {
                "span1_text": "小明",
                "span2_text": "他",
                "span1_index": 0,
                "span2_index": 3,
            },
        },
        [6, "_小明_说[他]饿了", "true"],
    ),
}
CLASSES = {"csl": ["0", "1"], "cluewsc2020": ["true", "false"]}
CARD = """---
configs:
- config_name: cmnli
  default: true
  data_files:
  - split: train
    path: cmnli/train-*
  - split: validation
    path: cmnli/validation-*
""" + "".join(
    f"""- config_name: {name}
  data_files:
  - split: train
    path: {name}/train-*
"""
    for name in ("cmrc2018", *OTHERS)
)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Hub]:
    import datasets

    directory = tmp_path / "published"
    (directory / "cmnli").mkdir(parents=True)
    # The hub's order of CMNLI's classes, which is not ours.
    label = datasets.ClassLabel(names=["neutral", "entailment", "contradiction"])
    text = datasets.Value("string")
    features = datasets.Features(
        {"sentence1": text, "sentence2": text, "label": label, "idx": datasets.Value("int32")}
    )
    rows = datasets.Dataset.from_list(ROWS, features=features)
    for split in ("train", "validation"):
        rows.to_parquet(str(directory / "cmnli" / f"{split}-00000-of-00001.parquet"))
    (directory / "cmrc2018").mkdir()
    questions = datasets.Dataset.from_list(QUESTIONS)
    questions.to_parquet(str(directory / "cmrc2018" / "train-00000-of-00001.parquet"))
    for name, (row, _) in OTHERS.items():
        (directory / name).mkdir()
        made = datasets.Dataset.from_list([row])
        if name in CLASSES:
            made = made.cast_column("label", datasets.ClassLabel(names=CLASSES[name]))
        made.to_parquet(str(directory / name / "train-00000-of-00001.parquet"))
    (directory / "README.md").write_text(f"{CARD}---\n", encoding="utf-8")
    with serving({"datasets/clue/clue": directory}) as hub:
        yield hub


def read(server: Hub, tmp_path: Path, *tasks: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import json, sys; from clue_ds.errors import run_command;"
        "from clue_ds.tasks import hub_data, registry\n"
        "def show():\n"
        f"    for task in {tasks!r}:\n"
        "        found = hub_data.read(registry.get(task), 'train')\n"
        "        print(json.dumps([list(found), found.num_skipped, found.sha256]))\n"
        "sys.exit(run_command('read', show))"
    )
    return server.run(tmp_path, "-c", code)


def test_a_task_is_read_with_its_labels_by_name(server: Hub, tmp_path: Path) -> None:
    done = read(server, tmp_path, "cmnli")
    assert done.returncode == 0, done.stderr
    found, num_skipped, digest = json.loads(done.stdout)
    assert found == [[0, ["甲", "乙"], "entailment"], [2, ["戊", "己"], "neutral"]]
    assert num_skipped == 1 and len(digest) == 64


def test_a_question_is_read_with_its_answers(server: Hub, tmp_path: Path) -> None:
    done = read(server, tmp_path, "cmrc2018")
    assert done.returncode == 0, done.stderr
    found, _, _ = json.loads(done.stdout)
    assert found == [["TRAIN_186_QUERY_0", ["谁?", "光荣在东京"], [["光荣"], 0, 2]]]


def test_rows_of_every_kind_of_task_are_read(server: Hub, tmp_path: Path) -> None:
    done = read(server, tmp_path, *OTHERS)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line)[0] for line in done.stdout.splitlines()]
    for rows, (name, (_, right)) in zip(found, OTHERS.items(), strict=True):
        assert rows == [right], name


def test_a_task_that_is_not_in_clue_clue_is_named_without_asking(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="clue/clue on the hub has no data of cluener, only of"):
        hub_data.read(registry.get("cluener"), "train")


def test_a_task_that_the_hub_lacks_is_one_message(server: Hub, tmp_path: Path) -> None:
    done = read(server, tmp_path, "afqmc")
    assert done.returncode == 2
    assert "can't fetch afqmc" in done.stderr and "Traceback" not in done.stderr


def test_fine_tuning_needs_no_file_but_what_the_hub_has(server: Hub, tmp_path: Path) -> None:
    """Model and data by their names, to a finished run."""
    state = dict(random_model(TINY_CONFIG, 0).state_dict())
    vocab_file = write_vocab(tmp_path / "vocab.txt", TINY_CONFIG.vocab_size)
    name = "clue/roberta_chinese_clue_tiny"
    server.repositories[f"models/{name}"] = export.save(
        TINY_CONFIG, state, vocab_file, tmp_path / "model"
    )
    words = ["-m", "clue_ds.cli", "finetune", "--task", "cmnli", "--model", name, "--data", "hub"]
    done = server.run(tmp_path, *words, "--epochs", "1", "--output", "out")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out/cmnli/best/result.json").read_text())
    assert result["model"] == name and result["data"]["dev"]["num_examples"] == 2
    assert (tmp_path / "out/cmnli/best/model/config.json").is_file()
    # A preset's name means the published model.
    words[words.index(name)] = "roberta_tiny_clue"
    again = server.run(tmp_path, *words, "--epochs", "1", "--output", "again")
    assert again.returncode == 0, again.stderr
    losses = [
        json.loads((tmp_path / out / "cmnli/best/result.json").read_text())["losses"]
        for out in ("out", "again")
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", ["hf:clue/clue:cmnli:train", "hf:clue/clue"])
def test_a_data_set_of_the_hub_becomes_a_corpus(server: Hub, tmp_path: Path, name: str) -> None:
    vocab = write_vocab(tmp_path / "vocab.txt", 30)
    verb = ["-m", "clue_ds.cli", "shard", name, "--text-field", "sentence1"]
    done = server.run(tmp_path, *verb, "--vocab", str(vocab), "--output", "corpus")
    assert done.returncode == 0, done.stderr
    assert Corpus(tmp_path / "corpus").num_documents == 3


def test_a_data_set_that_the_hub_lacks_is_one_message(server: Hub, tmp_path: Path) -> None:
    vocab = write_vocab(tmp_path / "vocab.txt", 30)
    verb = ["-m", "clue_ds.cli", "shard", "hf:nobody/nothing", "--vocab"]
    done = server.run(tmp_path, *verb, str(vocab), "--output", "corpus")
    assert done.returncode == 2, done.stderr
    assert "data set hf:nobody/nothing can't be opened" in done.stderr
    assert "Traceback" not in done.stderr
