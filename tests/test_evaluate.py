"""Evaluation while training: equal on any number of ranks, and without effect on training."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import make_corpus, pretrain_runs, read_log, run_ranks, tiny_config

from clue_ds.checkpoint import manifest
from clue_ds.checkpoint.masters import load_weights
from clue_ds.data import Corpus, SampleStream
from clue_ds.data.build.command import shard
from clue_ds.data.text.vocab import learn
from clue_ds.errors import UserError
from clue_ds.metrics import format_line
from clue_ds.model import BertForPreTraining
from clue_ds.pretrain import batches

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
EVALUATE = {"every": 2, "batches": 3}
# Another order of the sums over sequences.
LOSS_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> Path:
    """A corpus with another one in held_out/."""
    folder = tmp_path_factory.mktemp("evaluate")
    corpus = make_corpus(folder, sample_text)
    (folder / "other.txt").write_text(sample_text[: len(sample_text) // 2])
    shard(
        (str(folder / "other.txt"),),
        output=corpus / "held_out",
        vocab=corpus / "vocab.txt",
        workers=1,
    )
    return corpus


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """`with`, `without` (dropout on), `resumed` in two halves; `one` and `two` ranks, dropout off;
    `zero3` evaluates between its steps as `one` does."""
    folder = tmp_path_factory.mktemp("runs")
    alone = folder / "alone"
    shutil.copytree(corpus, alone, ignore=shutil.ignore_patterns("held_out"))

    def config(name: str, where: Path = corpus, **sections: Any) -> dict[str, Any]:
        sections = {"evaluate": EVALUATE, **sections}
        return tiny_config(where, folder / name, **sections).model_dump()

    wsd = {"schedule": "wsd"}
    runs = [
        config("with", train=wsd),
        config("without", alone, train=wsd),
        config("resumed", train={**wsd, "steps": 3}),
        config("resumed", train=wsd),
        config("one", model=NO_DROPOUT, checkpoint={"every": 2, "keep": 1, "keep_best": True}),
        config("zero3", model=NO_DROPOUT, deepspeed="zero3"),
    ]
    assert run_ranks(1, pretrain_runs, runs) == [[None] * 6]
    two = config("two", model=NO_DROPOUT, train={"micro_batch_size": 1})
    assert run_ranks(2, pretrain_runs, [two]) == [[None]] * 2
    return folder


def test_the_best_checkpoint_stays_beside_the_newest(folder: Path) -> None:
    losses = {line["step"]: line["held_out_loss"] for line in read_log(folder / "one")[1::2]}
    best = min(losses, key=losses.__getitem__)
    checkpoints = folder / "one" / "checkpoints"
    assert {manifest.step_of(p) for p in manifest.published(checkpoints)} == {best, 6}
    assert (checkpoints / "best").read_text() == manifest.name(best) + "\n"
    assert manifest.read(checkpoints / manifest.name(best)).held_out_loss == losses[best]


def test_it_stands_in_its_steps_lines(folder: Path) -> None:
    lines = read_log(folder / "with")
    steps = [line["step"] for line in lines if "held_out_loss" in line]
    assert steps == [2, 4, 6]
    assert not any("held_out_loss" in line for line in read_log(folder / "without"))
    assert "held out loss" in format_line(lines[-1], 6)
    assert "held out" not in format_line(lines[0], 6)


def test_any_number_of_ranks_and_any_stage_finds_the_same(folder: Path) -> None:
    one, two, zero3 = (read_log(folder / name) for name in ("one", "two", "zero3"))
    for a, b, c in zip(one, two, zero3, strict=True):
        for other in (b, c):
            assert ("held_out_loss" in a) == ("held_out_loss" in other)
            if "held_out_loss" in a:
                assert a["held_out_loss"] == pytest.approx(
                    other["held_out_loss"], abs=LOSS_TOLERANCE
                )
                assert a["held_out_mlm_accuracy"] == pytest.approx(
                    other["held_out_mlm_accuracy"], abs=0.01
                )


def test_training_goes_on_bit_for_bit(folder: Path) -> None:
    """Dropout is on: a random number drawn by an evaluation would show in every later loss."""
    losses = [line["loss"] for line in read_log(folder / "with")]
    assert [line["loss"] for line in read_log(folder / "without")] == losses
    assert [line["loss"] for line in read_log(folder / "resumed")] == losses
    held_out = [line.get("held_out_loss") for line in read_log(folder / "with")]
    resumed = [line.get("held_out_loss") for line in read_log(folder / "resumed")]
    assert resumed[3:] == held_out[3:]


def test_it_is_the_loss_of_the_saved_model_on_the_fixed_masks(folder: Path, corpus: Path) -> None:
    config, state, _ = load_weights(folder / "one")
    model = BertForPreTraining(config).eval()
    model.load_state_dict(state)
    stream = SampleStream(Corpus(corpus / "held_out"), 16, 8, 42)
    loss = predicted = 0.0
    for step in range(min(3, stream.steps_per_epoch)):
        with torch.no_grad():
            output = model(**stream.batch(step))
        loss += float(output.mlm_sum)
        predicted += float(output.num_predicted)
    line = read_log(folder / "one")[-1]
    assert line["held_out_loss"] == pytest.approx(loss / predicted, abs=LOSS_TOLERANCE)


def test_a_held_out_corpus_of_another_vocabulary_is_refused(
    corpus: Path, tmp_path: Path, sample_text: str
) -> None:
    (tmp_path / "text.txt").write_text(sample_text)
    learn((str(tmp_path / "text.txt"),), output=tmp_path / "vocab.txt", size=300)
    shard(
        (str(tmp_path / "text.txt"),),
        output=tmp_path / "other",
        vocab=tmp_path / "vocab.txt",
        workers=1,
    )
    config = tiny_config(corpus, tmp_path / "run", data={"held_out": str(tmp_path / "other")})
    with pytest.raises(UserError, match="held_out .* has another vocabulary"):
        batches.make_evaluator(config, Corpus(corpus))
