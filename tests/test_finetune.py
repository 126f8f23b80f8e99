"""Fine-tuning learns, repeats itself, and leaves a directory that others load."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers

import clue_ds.export as export
from clue_ds.errors import UserError
from clue_ds.model import BertForPreTraining, ops
from clue_ds.presets import ModelConfig
from clue_ds.tasks import Predictor, features
from clue_ds.tasks.finetune import command as finetune_command
from clue_ds.tasks.finetune.fit import Recipe, fit
from clue_ds.tasks.finetune.loop import _epoch
from clue_ds.tasks.predict import command as predict_command

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"一二三四五六七八九十好坏"]
CONFIG = ModelConfig(
    vocab_size=len(WORDS),
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=16,
)
RECIPE = Recipe(epochs=4, batch_size=16, lr=2e-3)


def examples(count: int, seed: int) -> list[tuple[str, str]]:
    """Texts of numerals with one 好 or 坏 somewhere, which is the label."""
    draws = random.Random(seed)
    result = []
    for _ in range(count):
        label = draws.choice("好坏")
        text = draws.choices(WORDS[5:15], k=draws.randrange(1, 12))
        text.insert(draws.randrange(len(text) + 1), label)
        result.append(("".join(text), label))
    return result


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    (directory / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    torch.manual_seed(0)
    state = BertForPreTraining(CONFIG).state_dict()
    return export.save(CONFIG, state, directory / "vocab.txt", directory / "hf")


def test_it_learns_a_task_and_the_saved_directory_says_the_same(
    model: Path, tmp_path: Path
) -> None:
    train, dev = examples(400, 1), examples(60, 2)
    heard: list[tuple[int, int, float]] = []
    result = fit(
        model,
        train,
        dev,
        tmp_path / "out",
        RECIPE,
        task="好坏",
        on_step=lambda *values: heard.append(values),
    )
    assert result.accuracy == 1.0 and result.losses[-1] < 0.1 < result.losses[0]
    assert [step for step, _, _ in heard] == list(range(1, 101))
    predictor = Predictor(tmp_path / "out", task="好坏")
    texts = [text for text, _ in dev]
    assert [p.label for p in predictor.predict(texts)] == result.predictions
    peer, info = transformers.BertForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokenizer = transformers.BertTokenizer.from_pretrained(tmp_path / "out")
    with torch.inference_mode():
        logits = peer.eval()(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    assert [peer.config.id2label[i] for i in logits.argmax(-1).tolist()] == result.predictions


def test_the_seed_decides_everything_and_torchs_generator_is_left_alone(model: Path) -> None:
    train, dev = examples(64, 1), examples(8, 2)
    short = Recipe(epochs=1, batch_size=16, lr=1e-3)
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = fit(model, train, dev, recipe=short)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert fit(model, train, dev, recipe=short).losses == first.losses
    other = fit(model, train, dev, recipe=Recipe(epochs=1, batch_size=16, lr=1e-3, seed=43))
    assert other.losses != first.losses


def test_pretrained_weights_are_used_unless_from_scratch(model: Path) -> None:
    """With a learning rate of almost 0 the predictions are those of the weights it began with."""
    config, state = export.load(model)
    spoiled = {n: t * 3 for n, t in state.items()}
    vocab_file = model / "vocab.txt"
    other = export.save(config, spoiled, vocab_file, model.parent / "other")
    train, dev = examples(32, 1), examples(8, 2)
    still = Recipe(epochs=1, lr=1e-12)
    losses = {
        (directory, scratch): fit(directory, train, dev, recipe=still, from_scratch=scratch).losses
        for directory in (model, other)
        for scratch in (False, True)
    }
    assert losses[model, False] != losses[other, False]
    assert losses[model, True] == losses[other, True]


def test_kernels_train_and_predict_what_their_twins_do(
    model: Path, tmp_path: Path, kernel_device: torch.device
) -> None:
    still = CONFIG.replace(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    plain = export.save(
        still, BertForPreTraining(still).state_dict(), model / "vocab.txt", tmp_path / "still"
    )
    rows = [json.dumps({"sentence": text, "label": label}) for text, label in examples(20, 1)]
    for name in ("train", "dev"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    row = tmp_path / "tone.yaml"
    row.write_text("name: tone\ntext: [sentence]\nlabels: [好, 坏]\nbatch_size: 8\n", "utf-8")
    losses, answers = [], []
    for kernels in ("torch", "triton"):
        out = tmp_path / kernels
        finetune_command.finetune(
            (str(row),), str(plain), str(tmp_path), out, lr=1e-4, epochs=1, kernels=kernels
        )
        losses.append(json.loads((out / "tone" / "best" / "result.json").read_text())["losses"])
        file, lines = tmp_path / "dev.jsonl", tmp_path / f"{kernels}.jsonl"
        predict_command.predict(out / "tone/best/model", file=file, output=lines, kernels=kernels)
        answers.append([json.loads(line) for line in lines.read_text("utf-8").splitlines()])
    ops.choose_kernels("torch")
    # Other orders of sums, through three AdamW steps.
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    for one, other in zip(*answers, strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-3)


def test_an_epoch_has_every_example_once_with_little_padding(model: Path) -> None:
    tokenizer = Predictor(model).tokenizer
    encoded = [features.encode(tokenizer, text, 16) for text, _ in examples(1_000, 3)]
    first = list(_epoch(encoded, 8, seed=1, epoch=0))
    assert Counter(i for rows in first for i in rows) == Counter(range(1_000))
    assert first != list(_epoch(encoded, 8, seed=1, epoch=1))
    lengths = [[len(encoded[i].input_ids) for i in rows] for rows in first]
    padded = sum(max(batch) * len(batch) for batch in lengths)
    assert padded < 1.1 * sum(map(sum, lengths))


@pytest.mark.parametrize(
    ("train", "dev", "message"),
    [
        ([], [("好", "a")], "no examples"),
        ([("好", "a")], [], "no examples"),
        ([("好", "a")], [("好", "a")], "two or more"),
        ([("好", "a"), ("坏", "b")], [("好", "c")], r"\['c'\] are in dev"),
    ],
)
def test_impossible_examples_are_errors(train: list, dev: list, message: str, model: Path) -> None:
    with pytest.raises(UserError, match=message):
        fit(model, train, dev)
