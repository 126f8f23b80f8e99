"""Objectives: packed rows, sentence pairs and labelled pairs, trained on one and on two ranks."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import make_corpus, pretrain_runs, read_log, run_ranks, tiny_config

from clue_ds import config as run_config
from clue_ds import export, presets
from clue_ds.checkpoint.masters import load_weights
from clue_ds.data import Corpus, SampleStream
from clue_ds.data.build.command import shard
from clue_ds.data.stream.labelled_pairs import LabelledPairs
from clue_ds.errors import UserError
from clue_ds.model import BertForPreTraining
from clue_ds.model.pairs import BertForPairs
from clue_ds.model.weights import SEGMENT_EMBEDDINGS
from clue_ds.pretrain import batches

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# Two ranks add the sequences' losses in another order.
LOSS_TOLERANCE = 1e-5
MODEL = presets.get("roberta_tiny_clue").replace(
    num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=64, **NO_DROPOUT
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> Path:
    return make_corpus(tmp_path_factory.mktemp("objectives"), sample_text)


def write_pairs(path: Path, text: str, num: int, labels: tuple[str, str], seed: int) -> Path:
    """Write pairs: two halves of one line (labels[1]), or halves of two lines (labels[0])."""
    lines = [line for line in text.split("\n") if len(line) > 12]
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(num):
            same = draw.random() < 0.6
            one, other = draw.sample(lines, 2)
            second = (one if same else other)[6:12]
            pair = {"sentence1": one[:6], "sentence2": second, "label": labels[same]}
            file.write(json.dumps(pair, ensure_ascii=False) + "\n")
        file.write('{"sentence1": "甲", "sentence2": "乙", "label": "-"}\n')
    return path


@pytest.fixture(scope="module")
def pair_files(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> list[str]:
    """Two files with the same labels, and one with other labels."""
    folder = tmp_path_factory.mktemp("pairs")
    return [
        str(write_pairs(folder / name, sample_text, num, labels, seed))
        for seed, (name, num, labels) in enumerate(
            [
                ("one.json", 40, ("0", "1")),
                ("nli.json", 30, ("neutral", "entailment")),
                ("two.json", 20, ("0", "1")),
            ]
        )
    ]


# ------------------------------------------------------------------------------------------ packed


@pytest.mark.parametrize("attention", ["sdpa", "masked_softmax"])
def test_packed_sequences_are_computed_as_if_alone(corpus: Path, attention: Any) -> None:
    opened = Corpus(corpus)
    model = BertForPreTraining(MODEL.replace(vocab_size=opened.vocab_size), attention).eval()
    batch = SampleStream(opened, 128, 4, 0, samples="packed").batch(0)
    ends = batch["cu_seqlens"]
    assert (ends.diff() > 0).sum() > 6, "some rows hold several documents"
    with torch.no_grad():
        packed = model(batch["input_ids"], cu_seqlens=ends).prediction_logits
        wanted = torch.zeros(4, 3, dtype=torch.int64)
        wanted[:, 1] = ends[:, 1]
        some = model(batch["input_ids"], cu_seqlens=ends, masked_positions=wanted).prediction_logits
    for b in range(4):
        for begin, end in zip(ends[b, :-1].tolist(), ends[b, 1:].tolist(), strict=True):
            if begin < end:
                with torch.no_grad():
                    alone = model(batch["input_ids"][b : b + 1, begin:end]).prediction_logits
                torch.testing.assert_close(packed[b, begin:end], alone[0], atol=1e-5, rtol=1e-5)
        at = wanted[b]
        if at[1] < 128:
            torch.testing.assert_close(some[b], packed[b, at], atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------ losses


def test_losses_of_pairs_are_transformers_losses(corpus: Path) -> None:
    """The loss is mlm_weight times the MLM's mean over slots, plus the mean over pairs."""
    opened = Corpus(corpus)
    model = BertForPreTraining(MODEL.replace(vocab_size=opened.vocab_size)).eval()
    model.mlm_weight = 0.3
    batch = SampleStream(opened, 64, 8, 0, samples="sop").batch(0)
    batch["next_sentence_label"][3] = -100
    output = model(**batch)
    free = {k: v for k, v in batch.items() if k not in ("masked_labels", "next_sentence_label")}
    logits = model(**free)
    mlm = F.cross_entropy(
        logits.prediction_logits.flatten(0, 1), batch["masked_labels"].flatten(), reduction="sum"
    )
    labels = batch["next_sentence_label"]
    pair = F.cross_entropy(logits.seq_relationship_logits, labels, reduction="sum")
    expected = 0.3 * mlm / batch["masked_labels"].numel() + pair / 8
    torch.testing.assert_close(output.loss, expected, atol=1e-5, rtol=1e-5)
    hits = (logits.seq_relationship_logits.argmax(-1) == labels).sum()
    assert output.pair_sums.tolist() == pytest.approx([pair.item(), hits.item(), 7], rel=1e-4)
    output.loss.backward()
    assert model.bert.pooler.dense.weight.grad.abs().sum() > 0
    assert model.cls.seq_relationship.weight.grad.abs().sum() > 0


def test_labels_of_other_sets_are_never_considered() -> None:
    model = BertForPairs(MODEL.replace(vocab_size=90), [0, 0, 1, 1, 1]).eval()
    pooled, labels = torch.randn(4, 32), torch.tensor([1, 4, 2, 0])
    logits = model.pair_logits(pooled, labels)
    assert (logits[[0, 3]][:, 2:] == -torch.inf).all() and logits[[0, 3]][:, :2].isfinite().all()
    assert (logits[[1, 2]][:, :2] == -torch.inf).all() and logits[[1, 2]][:, 2:].isfinite().all()


# ----------------------------------------------------------------------------------- labelled pairs


def test_pairs_are_read_and_equal_label_sets_are_shared(
    corpus: Path, pair_files: list[str]
) -> None:
    pairs = LabelledPairs(tuple(pair_files), corpus)
    assert pairs.labels == [(0, "0"), (0, "1"), (1, "entailment"), (1, "neutral")]
    assert (pairs.num_documents, pairs.num_skipped) == (90, 3)
    records = [json.loads(line) for path in pair_files for line in Path(path).open()]
    records = [record for record in records if record["label"] != "-"]
    assert [pairs.labels[i][1] for i in pairs.targets] == [record["label"] for record in records]
    stream = SampleStream(pairs, 64, 1, 0)
    assert stream.num_samples == 90
    seen = set()
    tokenizer = pairs._tokenizer
    texts = {
        (tuple(tokenizer.encode(r["sentence1"])), tuple(tokenizer.encode(r["sentence2"])))
        for r in records
    }
    for step in range(90):
        batch = stream.batch(step)
        ids, positions = batch["input_ids"][0], batch["masked_positions"][0]
        used = batch["masked_labels"][0] >= 0
        ids[positions[used]] = batch["masked_labels"][0][used]
        types = batch["token_type_ids"][0]
        middle = int(types.argmax())
        row = ids[: batch["lengths"][0]].tolist()
        seen.add((tuple(row[1 : middle - 1]), tuple(row[middle:-1])))
    assert seen == texts


def test_the_longer_sentence_is_cut(corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.json"
    long, short = "中" * 60, "文" * 5
    cases = [(long, short), (short, long), (long, long)]
    with path.open("w") as file:
        for i, (one, other) in enumerate(cases):
            file.write(json.dumps({"sentence1": one, "sentence2": other, "label": i % 2}) + "\n")
    stream = SampleStream(LabelledPairs((str(path),), corpus), 32, 3, 0)
    batch = stream.batch(0)
    assert batch["lengths"].tolist() == [32, 32, 32]
    ones = sorted(batch["token_type_ids"].sum(1).tolist())
    assert ones == [6, 15, 25]  # sentence2 and its [SEP]: 5 + 1, 29 // 2 + 1, 29 - 5 + 1


MISTAKES = {
    "not JSON": ("{", "line 2 is not JSON"),
    "a field": (
        '{"sentence1": "a", "label": "1"}',
        "line 2 lacks one of the fields sentence1, sent",
    ),
    "empty": (
        '{"sentence1": "a", "sentence2": " ", "label": "1"}',
        "line 2 has an empty sentence2",
    ),
    "null text": (
        '{"sentence1": null, "sentence2": "b", "label": "1"}',
        r"pairs\.json, line 2: sentence1 is null, not text",
    ),
    "null label": (
        '{"sentence1": "a", "sentence2": "b", "label": null}',
        r"pairs\.json, line 2: label is null, not text",
    ),
    "list": ('{"sentence1": "a", "sentence2": ["b"], "label": 1}', "line 2: sentence2 is a list"),
    "surrogate": (
        '{"sentence1": "\\ud800", "sentence2": "b", "label": 1}',
        "line 2: sentence1 has half of a surrogate pair",
    ),
    "one label": ('{"sentence1": "a", "sentence2": "b", "label": "0"}', "only the label '0'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_pairs_name_file_and_line(corpus: Path, tmp_path: Path, mistake: str) -> None:
    line, message = MISTAKES[mistake]
    path = tmp_path / "pairs.json"
    path.write_text('{"sentence1": "a", "sentence2": "b", "label": "0"}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        LabelledPairs((str(path),), corpus)


def test_blank_lines_marks_and_brackets_make_no_difference(corpus: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"sentence1": "中", "sentence2": "文", "label": i}) for i in (0, 1)]
    plain, odd = tmp_path / "a1.json", tmp_path / "a[1].json"
    plain.write_text("\n".join(lines))
    odd.write_text("\ufeff\n" + " \r\n\r\n".join(lines) + "\n \n\n")
    pairs = [LabelledPairs((str(path),), corpus) for path in (plain, odd)]
    assert pairs[0].fingerprint == pairs[1].fingerprint
    assert pairs[1].num_documents == 2


def test_a_note_says_when_nsp_has_true_pairs_only(corpus: Path, tmp_path: Path) -> None:
    config = tiny_config(corpus, tmp_path / "run", train={"objective": "nsp"})
    assert batches.describe(config, Corpus(corpus)) == []
    (tmp_path / "one.txt").write_text("中文。\n第二句。\n")
    shard(
        (str(tmp_path / "one.txt"),),
        output=tmp_path / "one",
        vocab=corpus / "vocab.txt",
        words="none",
        workers=1,
    )
    (note,) = batches.describe(config, Corpus(tmp_path / "one"))
    assert "every pair is a true pair, and nsp learns nothing from it" in note
    mlm = tiny_config(corpus, tmp_path / "run")
    assert batches.describe(mlm, Corpus(tmp_path / "one")) == []


def test_settings_that_do_not_belong_together(corpus: Path, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"train": {"objective": "pair"}}, "data.pairs .* or neither"),
        ({"data": {"pairs": ["x"]}}, "data.pairs .* or neither"),
        ({"train": {"objective": "sop"}, "data": {"samples": "packed"}}, "can.t be used"),
        ({"train": {"mlm_weight": 0.5}}, "mlm_weight applies only to"),
    ]
    for sections, message in cases:
        with pytest.raises(UserError, match=message):
            tiny_config(corpus, tmp_path / "run", **sections)


# -------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, corpus: Path, pair_files: list[str]) -> Path:
    """Runs of each objective on one and on two ranks; `pair` also with a resume, with dropout."""
    folder = tmp_path_factory.mktemp("runs")

    def configs(ranks: int) -> list[dict[str, Any]]:
        found = []
        for name, sections in {
            "sop": {"train": {"objective": "sop"}},
            "nsp": {"train": {"objective": "nsp"}, "deepspeed": "zero3"},
            "packed": {"data": {"samples": "packed", "max_ngram": 3}},
            "pair": {
                "train": {"objective": "pair"},
                "data": {"pairs": pair_files, "held_out": pair_files[0]},
                "evaluate": {"every": 2, "batches": 3},
            },
        }.items():
            sections["train"] = {**sections.get("train", {}), "micro_batch_size": 4 // ranks}  # type: ignore[dict-item]
            run_dir = folder / f"{name}{ranks}"
            found.append(tiny_config(corpus, run_dir, model=NO_DROPOUT, **sections).model_dump())
        return found

    halves: list[dict[str, Any]] = []
    for name, steps in (("whole", 0), ("halves", 3), ("halves", 0)):
        config = tiny_config(
            corpus,
            folder / name,
            data={"pairs": pair_files, "held_out": pair_files[0]},
            train={"objective": "pair", "schedule": "wsd", "steps": steps or 6},
            evaluate={"every": 1 if name == "whole" else 5, "batches": 2},
        )
        halves.append(config.model_dump())
    assert run_ranks(1, pretrain_runs, configs(1) + halves) == [[None] * 7]
    assert run_ranks(2, pretrain_runs, configs(2)) == [[None] * 4] * 2
    return folder


@pytest.mark.parametrize("name", ["sop", "nsp", "packed", "pair"])
def test_losses_do_not_depend_on_ranks(folder: Path, name: str) -> None:
    one, two = (read_log(folder / f"{name}{ranks}") for ranks in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=LOSS_TOLERANCE)
        assert ("pair_accuracy" in a) == (name != "packed")
        for key in a:
            if key.startswith("held_out") and "loss" in key:
                assert a[key] == pytest.approx(b[key], abs=LOSS_TOLERANCE)
    assert ("held_out_pair_accuracy" in one[-1]) == (name == "pair")


def test_a_pair_run_resumes_bit_for_bit(folder: Path) -> None:
    """With dropout, and with evaluations at other steps."""
    whole, halves = (read_log(folder / name) for name in ("whole", "halves"))
    assert [line["loss"] for line in halves] == [line["loss"] for line in whole]
    assert [line["pair_loss"] for line in halves] == [line["pair_loss"] for line in whole]


def test_a_pair_model_is_exported_as_a_plain_bert(folder: Path, tmp_path: Path) -> None:
    from transformers import BertForPreTraining as Theirs

    config, state, vocab_file = load_weights(folder / "pair1")
    assert not any("pair_head" in name for name in state)
    export.save(config, state, vocab_file, tmp_path / "hf")
    model, info = Theirs.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    trained = model.bert.pooler.dense.weight
    torch.testing.assert_close(trained, state["bert.pooler.dense.weight"])
    kept = export.open_model(folder / "pair1").state_dict[SEGMENT_EMBEDDINGS]
    assert torch.equal(kept, state[SEGMENT_EMBEDDINGS])  # its pairs have trained both segments
    fresh = run_config.load(folder / "pair1" / "config.yaml")
    assert fresh.train.objective == "pair"
