"""Models named on the hub: the real huggingface_hub against a hub of ours on loopback."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from loopback_hub import TOKEN, Hub, serving
from models import TINY_CONFIG, random_model, same_bits, write_vocab

from clue_ds import export
from clue_ds.export import card, hub
from clue_ds.model.finetuned import FineTuned
from clue_ds.model.weights import StateDict
from clue_ds.presets import NAMES

TINY = "clue/roberta_chinese_clue_tiny"


@pytest.fixture
def state() -> StateDict:
    return dict(random_model(TINY_CONFIG, 0).state_dict())


@pytest.fixture
def server(tmp_path: Path, state: StateDict) -> Iterator[Hub]:
    """A hub with one model like CLUE's: its config says roberta."""
    vocab_file = write_vocab(tmp_path / "vocab.txt", TINY_CONFIG.vocab_size)
    directory = export.save(TINY_CONFIG, state, vocab_file, tmp_path / "published", legacy=True)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"model_type": "roberta"}))
    (directory / "modeling_evil.py").write_text("raise SystemExit")
    with serving({f"models/{TINY}": directory}) as hub_server:
        yield hub_server


@pytest.mark.parametrize(
    ("name", "is_name"),
    [
        ("bert-base-chinese", True),
        ("bert-base-multilingual-cased", True),
        ("hfl/chinese-roberta-wwm-ext", True),
        ("modle", False),
        ("bert-mine", False),
        ("a/b/c", False),
    ],
)
def test_names_of_the_hub_with_and_without_owner(name: str, is_name: bool) -> None:
    assert hub.is_name(name) == is_name


def test_name_without_owner_is_downloaded(server: Hub, state: StateDict, tmp_path: Path) -> None:
    server.repositories["models/bert-base-chinese"] = server.repositories[f"models/{TINY}"]
    done = run(server, tmp_path, "import", "bert-base-chinese", "--output", "out")
    assert done.returncode == 0, done.stderr
    found = export.load(tmp_path / "out")[1]
    assert all(same_bits(found[key], tensor) for key, tensor in state.items())


def test_model_is_published_under_its_name(server: Hub, state: StateDict, tmp_path: Path) -> None:
    """Pushed, and loaded again by the name that its card gives."""
    server.uploads = tmp_path
    source = tmp_path / "vocab.txt"
    model = export.save(TINY_CONFIG, state, source, tmp_path / "mine")
    done = run(server, tmp_path, "push", str(model), "we/good", "--private", token=TOKEN)
    assert done.returncode == 0, done.stderr
    assert "published" in done.stdout and "we/good" in done.stdout
    assert server.private == {"we/good": True}
    there = server.repositories["models/we/good"]
    assert {path.name for path in there.iterdir()} == {path.name for path in model.iterdir()}
    card = (there / "README.md").read_text(encoding="utf-8")
    assert "# we/good" in card and 'from_pretrained("we/good")' in card and '"mine"' not in card
    assert run(server, tmp_path, "import", "we/good", "--output", "out").returncode == 0
    found = export.load(tmp_path / "out")[1]
    assert all(same_bits(found[key], tensor) for key, tensor in state.items())
    done = run(server, tmp_path, "push", str(model), "we/good")
    assert done.returncode == 2 and "log in with `hf auth login`" in done.stderr
    done = run(server, tmp_path, "push", str(tmp_path), "we/good")
    assert done.returncode == 2 and "holds no model" in done.stderr


def test_card_of_a_published_model_has_its_name_and_licence() -> None:
    text = card.renamed(
        '---\nlanguage:\n- zh\n---\n\n# hf\n\nload("hf")\n', "we/good", "apache-2.0"
    )
    assert "license: apache-2.0" in text and '# we/good\n\nload("we/good")' in text


@pytest.mark.parametrize(
    ("architecture", "dev", "said"),
    [
        ("BertForQuestionAnswering", {"em": 0.5, "f1": 0.75}, ["EM on dev | 0.5", "| F1 on dev"]),
        ("BertForTokenClassification", {"span_f1": 0.25}, ["| F1 of spans on dev | 0.25"]),
        ("BertForSequenceClassification", {"f1": 0.25}, ["| macro F1 on dev | 0.25"]),
    ],
)
def test_card_calls_the_scores_of_each_kind_of_task_by_their_names(
    architecture: str, dev: dict[str, float], said: list[str], tmp_path: Path
) -> None:
    values = asdict(TINY_CONFIG) | {"architectures": [architecture], "torch_dtype": "float32"}
    about = FineTuned(("a",), task="cmrc2018", architecture=architecture, dev=dev)
    about = replace(about, base="modelscope:we/bert")
    text = card.model_card("we/good", values, {}, tmp_path, about)
    assert all(one in text for one in said), text
    assert f"value: {next(iter(dev.values()))}" in text
    assert "base_model" not in text, "it names a model of the Hugging Face hub"


def run(
    server: Hub, tmp_path: Path, *arguments: str, token: str | None = None
) -> subprocess.CompletedProcess[str]:
    return server.run(tmp_path, "-m", "clue_ds.cli", *arguments, token=token)


@pytest.mark.parametrize(
    ("name", "weights"),
    [(TINY, "model.safetensors"), ("roberta_tiny_clue", "pytorch_model.bin")],
)
def test_published_model_is_imported_by_name(
    name: str, weights: str, server: Hub, state: StateDict, tmp_path: Path
) -> None:
    if weights == "pytorch_model.bin":
        (server.repositories[f"models/{TINY}"] / "model.safetensors").unlink()
    done = run(server, tmp_path, "import", name, "--output", "out")
    assert done.returncode == 0, done.stderr
    found = export.load(tmp_path / "out")[1]
    assert all(same_bits(found[key], tensor) for key, tensor in state.items())
    # One copy of the weights, no code, no card.
    assert server.asked == {
        *("config.json", "tokenizer_config.json", "tokenizer.json", "vocab.txt"),
        weights,
    }


def test_unknown_name_is_one_message(server: Hub, tmp_path: Path) -> None:
    (tmp_path / "cleu").mkdir()
    done = run(server, tmp_path, "import", "clue/no_such_model", "--output", "out")
    assert "did you mean cleu/no_such_model?" in done.stderr
    assert done.returncode == 2
    assert "is no directory in" in done.stderr and "hub has no model" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_hub_that_cannot_be_reached_is_one_message(server: Hub, tmp_path: Path) -> None:
    server.socket.close()
    server.server_port = 9  # nobody listens there
    done = run(server, tmp_path, "import", TINY, "--output", "out")
    assert done.returncode == 2, done.stderr
    assert "can't be downloaded" in done.stderr and "Traceback" not in done.stderr


def test_names_of_published_models_are_presets_of_ours() -> None:
    assert set(hub.PUBLISHED) == {name for name in NAMES if name.startswith("roberta_")}


def test_path_is_never_taken_for_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    assert not hub.is_name("runs/mine")
    assert not hub.is_name("runs/misspelled")
    assert not hub.is_name("nowhere")
    assert not hub.is_name("a/b/c") and not hub.is_name("/a/b") and not hub.is_name("./a")
    assert hub.is_name(TINY)
