"""The Predictor against transformers' pipelines with the same directory."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import BertTokenizer

import clue_ds.export as export
from clue_ds.cli import main
from clue_ds.errors import UserError
from clue_ds.export import huggingface
from clue_ds.model import BertForPreTraining
from clue_ds.model.finetuned import FineTuned
from clue_ds.presets import ModelConfig
from clue_ds.tasks import Predictor, examples, features, registry
from clue_ds.tasks.heads import BertForSequenceClassification
from clue_ds.tasks.predict import command

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = SPECIAL + list("今天气很好我们在湖面上读书，。ab") + ["##b", "[", "]", "mask"]
CONFIG = ModelConfig(
    vocab_size=len(WORDS),
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=40,
    max_position_embeddings=16,
)
TEXTS = ["今天天气很好。", "AB", "我们在湖面上读书，我们", "", "好"]


def randomize(model: torch.nn.Module) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)


@pytest.fixture(scope="module")
def vocab_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory, vocab_file: Path) -> Path:
    model = BertForPreTraining(CONFIG)
    randomize(model)
    directory = tmp_path_factory.mktemp("models") / "hf"
    return export.save(CONFIG, model.state_dict(), vocab_file, directory)


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory: pytest.TempPathFactory, vocab_file: Path) -> Path:
    model = BertForSequenceClassification(CONFIG, 3)
    randomize(model)
    return huggingface.write(
        CONFIG,
        model.state_dict(),
        vocab_file,
        tmp_path_factory.mktemp("models") / "cls",
        finetuned=FineTuned(("坏", "中", "好"), task="reviews"),
    )


@pytest.mark.parametrize("text", ["今天天气[MASK]好", "[MASK]们在[MASK]面上AB[MASK]", "[MASK]"])
def test_fill_mask_equals_transformers(text: str, pretrained: Path) -> None:
    found = Predictor(pretrained).fill_mask(text, top_k=4)
    tokenizer = BertTokenizer.from_pretrained(pretrained)
    peer = transformers.BertForMaskedLM.from_pretrained(pretrained).eval()
    inputs = tokenizer(text, return_tensors="pt")
    with torch.inference_mode():
        probabilities = peer(**inputs).logits[0].softmax(-1)
    masks = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero()[:, 0]
    assert len(found) == len(masks) == text.count("[MASK]")
    for candidates, position in zip(found, masks, strict=True):
        best, ids = probabilities[position].topk(4)
        assert [token for token, _ in candidates] == tokenizer.convert_ids_to_tokens(ids.tolist())
        np.testing.assert_allclose([p for _, p in candidates], best.numpy(), atol=1e-6)


def test_embed_is_the_mean_over_real_tokens_in_the_order_of_the_texts(pretrained: Path) -> None:
    found = Predictor(pretrained, batch_size=2).embed(TEXTS)
    tokenizer = BertTokenizer.from_pretrained(pretrained)
    peer = transformers.BertModel.from_pretrained(pretrained).eval()
    assert found.shape == (len(TEXTS), CONFIG.hidden_size) and found.dtype == np.float32
    for row, text in zip(found, TEXTS, strict=True):
        with torch.inference_mode():
            hidden = peer(**tokenizer(text, return_tensors="pt")).last_hidden_state
        np.testing.assert_allclose(row, hidden[0].mean(0).numpy(), atol=2e-6)
    assert Predictor(pretrained).embed([]).shape == (0, CONFIG.hidden_size)


def test_predict_equals_transformers_for_texts_and_pairs(finetuned: Path) -> None:
    texts = [*TEXTS, ("今天", "天气很好"), ("湖面上", "A")]
    found = Predictor(finetuned, task="reviews", batch_size=3).predict(texts)
    tokenizer = BertTokenizer.from_pretrained(finetuned)
    peer = transformers.BertForSequenceClassification.from_pretrained(finetuned).eval()
    for prediction, text in zip(found, texts, strict=True):
        parts = (text,) if isinstance(text, str) else text
        with torch.inference_mode():
            logits = peer(**tokenizer(*parts, return_tensors="pt")).logits[0]
        expected = logits.softmax(-1).tolist()
        assert list(prediction.probabilities) == ["坏", "中", "好"]
        np.testing.assert_allclose(list(prediction.probabilities.values()), expected, atol=1e-6)
        assert prediction.label == peer.config.id2label[int(logits.argmax())]


def test_long_texts_are_cut_and_it_says_so(pretrained: Path) -> None:
    predictor = Predictor(pretrained)
    with pytest.warns(UserWarning, match="1 of 2 texts were cut to the 16 tokens"):
        found = predictor.embed(["好" * 50, "好"])
    np.testing.assert_allclose(found[0], predictor.embed(["好" * 14])[0], atol=1e-6)
    with pytest.warns(UserWarning, match="cut"):
        assert predictor.fill_mask("好[MASK]" + "好" * 50)
    with pytest.raises(UserError, match="beyond the 16 tokens"):
        predictor.fill_mask("好" * 50 + "[MASK]")


def test_truncating_a_pair_shortens_the_longer_text(finetuned: Path) -> None:
    predictor = Predictor(finetuned)
    with pytest.warns(UserWarning):
        long = predictor.predict([("好" * 20, "今天"), ("今天", "好" * 20)])
    short = predictor.predict([("好" * 11, "今天"), ("今天", "好" * 11)])
    for a, b in zip(long, short, strict=True):
        assert a.probabilities == pytest.approx(b.probabilities, abs=1e-6)


def test_shares_of_a_pair_equal_removing_tokens_from_the_longer_one() -> None:
    for first in range(12):
        for second in range(12):
            for room in range(1, 14):
                kept = [first, second]
                while sum(kept) > room:
                    kept[0 if kept[0] >= kept[1] else 1] -= 1
                assert features.shares([first, second], room) == kept


def test_mistakes_get_one_clear_message(
    pretrained: Path, finetuned: Path, tmp_path: Path, vocab_file: Path
) -> None:
    predictor = Predictor(pretrained)
    for call, message in (
        (lambda: predictor.fill_mask("今天"), r"no \[MASK\]"),
        (lambda: predictor.fill_mask("[MASK]", top_k=0), "top_k 0"),
        (lambda: predictor.predict(["好"]), "fine-tune it first"),
        (lambda: predictor.embed("好"), "a list of texts"),
        (lambda: Predictor(finetuned).fill_mask("[MASK]"), "no masked-language-model head"),
        (lambda: Predictor(finetuned, task="tnews"), "fine-tuned for 'reviews', not 'tnews'"),
        (lambda: Predictor(pretrained, task="tnews"), "is not fine-tuned"),
        (lambda: Predictor(tmp_path / "none"), "not a directory"),
    ):
        with pytest.raises(UserError, match=message):
            call()
    encoder = {n: t for n, t in export.load(pretrained)[1].items() if n.startswith("bert.")}
    directory = export.save(CONFIG, encoder, vocab_file, tmp_path / "encoder")
    with pytest.raises(UserError, match="no masked-language-model head"):
        Predictor(directory).fill_mask("[MASK]")
    (directory / "vocab.txt").unlink()
    (directory / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="vocab.txt does not exist"):
        Predictor(directory)


def test_verb_prints_candidates(pretrained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["predict", "--model", str(pretrained), "--fill-mask", "今天[MASK]气", "--top-k", "3"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    (candidates,) = Predictor(pretrained).fill_mask("今天[MASK]气", top_k=3)
    assert "今天[MASK]气" in out
    for token, probability in candidates:
        assert f"{token} {100 * probability:5.1f}%" in out
    assert main(["predict", "--model", str(pretrained), "--fill-mask", "今天"]) == 2
    assert "no [MASK]" in capsys.readouterr().err


def write_lines(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_a_file_is_answered_in_its_order(
    batch_size: int, finetuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clue_ds.tasks.predict.command.CHUNK", 7)
    draws = np.random.default_rng(batch_size)
    texts = ["".join(draws.choice(WORDS[5:20], size=draws.integers(1, 14))) for _ in range(40)]
    rows = [json.dumps({"id": 1000 - i, "text": text}) for i, text in enumerate(texts)]
    file, out = write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    predictor = Predictor(finetuned, batch_size=batch_size)
    command.predict_file(predictor, file, out)
    answers = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [answer["id"] for answer in answers] == [1000 - i for i in range(40)]
    for answer, text in zip(answers, texts, strict=True):
        (alone,) = predictor.predict([text])
        assert answer["label"] == alone.label
        assert answer["probabilities"] == pytest.approx(alone.probabilities, abs=2e-6)
    command.predict_file(predictor, file, tmp_path / "v.npy", embed=True)
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), predictor.embed(texts), atol=1e-5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "好"}\n{"text": \n', "in.jsonl:2: not JSON"),
        ('{"text": "好"}\n\n{"name": "好"}\n', "in.jsonl:3: no field"),
        ('{"text": "好"}\n{"text": 3}\n', "in.jsonl:2: 3 is not text"),
        ('{"text": "好"}\n{"text": " "}\n', "in.jsonl:2: the text is empty"),
        ('{"text": "\\ud800"}\n', "in.jsonl:1: '\\\\ud800' is half a character"),
        ("", "in.jsonl has no examples"),
        ('["好"]\n', "in.jsonl:1: a JSON array begins here"),
    ],
)
def test_a_bad_file_is_one_message_and_leaves_no_output(
    content: str, message: str, finetuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text(content, encoding="utf-8")
    argv = ["predict", "--model", str(finetuned), "--file", str(file), "--output", str(out)]
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert message.replace("\\\\", "\\") in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_long_text_is_answered_and_said_to_be_cut_and_an_endless_one_refused(
    finetuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predictor = Predictor(finetuned)
    file = write_lines(tmp_path / "in.jsonl", [json.dumps({"text": "好" * 40_000})])
    command.predict_file(predictor, file, tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text("utf-8"))["truncated"] is True
    assert "1 of them cut to 16 tokens" in capsys.readouterr().out
    rows = [{"text": "好"}, {"text": "好" * 100_000}]
    file = write_lines(tmp_path / "bad.jsonl", [json.dumps(row) for row in rows])
    with pytest.raises(UserError, match=r"bad\.jsonl:2: a text of 100,000 characters"):
        command.predict_file(predictor, file, tmp_path / "none.jsonl")
    assert not (tmp_path / "none.jsonl").exists()


def test_similarity_is_the_cosine_of_the_embeddings(pretrained: Path) -> None:
    predictor = Predictor(pretrained)
    first, second = ["今天", "湖面上"], ["天气很好", "湖面上"]
    a, b = predictor.embed(first), predictor.embed(second)
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    found = predictor.similarity(first, second)
    np.testing.assert_allclose(found, cosine, atol=1e-6)
    assert found[1] == pytest.approx(1, abs=1e-6)


def test_tasks_read_what_finetuning_reads(
    vocab_file: Path, tmp_path: Path, shared_data: Path
) -> None:
    for name in ("csl", "cluewsc2020", "afqmc"):
        task = registry.TASKS[name]
        directory = huggingface.write(
            CONFIG,
            BertForSequenceClassification(CONFIG, 2).state_dict(),
            vocab_file,
            tmp_path / name,
            finetuned=FineTuned(task.labels, task=name),
        )
        path = examples.find(task, shared_data / "clue", "test")
        read = command.read_unlabelled(Predictor(directory), path)
        expected = examples.read(task, path, labelled=False)
        assert [(e.id, e.text) for e in read] == [(e.id, e.text) for e in expected]


def test_the_directory_around_a_model_is_answered_with_the_model(
    finetuned: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(finetuned)
    (tmp_path / "best").symlink_to("run")
    for directory, model in (("best", "best/model"), ("", "best/model")):
        with pytest.raises(UserError, match=f"; give the model: {tmp_path / model}$"):
            Predictor(tmp_path / directory)
