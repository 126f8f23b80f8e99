"""Tags, windows and the pointer head: what is trained is what is answered."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from clue_ds.data import Tokenizer
from clue_ds.presets import ModelConfig
from clue_ds.tasks.kinds.tag import baselines, entities, pointer, schemes, scores
from clue_ds.tasks.kinds.tag.entities import Entity, Label
from clue_ds.tasks.kinds.tag.schemes import Span
from clue_ds.tasks.kinds.tag.windows import Window, windows

TYPES = ("name", "company")


def partitions(num_tokens: int) -> Iterator[list[Span]]:
    """Every set of entities of two types in so many tokens."""
    if num_tokens == 0:
        yield []
        return
    for before in partitions(num_tokens - 1):
        yield before
    for length in range(1, num_tokens + 1):
        for before in partitions(num_tokens - length):
            for kind in TYPES:
                yield [*before, Span(kind, num_tokens - length, num_tokens - 1)]


@pytest.mark.parametrize("scheme", ["bio", "bios", "bioes"])
def test_every_set_of_entities_survives_its_tags(scheme: schemes.Scheme) -> None:
    names = schemes.tags(TYPES, scheme)
    assert schemes.types_of(names) == TYPES
    for num_tokens in range(6):
        for spans in partitions(num_tokens):
            tags = schemes.encode(num_tokens, spans, names)
            assert schemes.decode(tags.tolist(), names) == spans


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        ("I-a I-a O I-b", [("a", 0, 1), ("b", 3, 3)]),
        ("B-a B-a I-b I-a", [("a", 0, 0), ("a", 1, 1), ("b", 2, 2), ("a", 3, 3)]),
        (
            "B-a E-a I-a E-b S-b S-b",
            [("a", 0, 1), ("a", 2, 2), ("b", 3, 3), ("b", 4, 4), ("b", 5, 5)],
        ),
        ("a a O b", [("a", 0, 1), ("b", 3, 3)]),
    ],
)
def test_tags_that_no_scheme_allows_have_a_meaning(tags: str, spans: list[tuple]) -> None:
    names = sorted({"O", *tags.split()})
    ids = [names.index(tag) for tag in tags.split()]
    assert schemes.decode(ids, names) == [Span(*span) for span in spans]


def test_every_token_belongs_to_one_window_the_one_with_most_context() -> None:
    for num_tokens, room in itertools.product(range(60), (1, 2, 3, 8, 9)):
        found = windows(num_tokens, room)
        owned = [token for w in found for token in range(w.own_begin, w.own_end)]
        assert owned == list(range(num_tokens)), (num_tokens, room)
        for window in found:
            assert window.begin <= window.own_begin and window.own_end <= window.end
            assert window.end - window.begin <= room
            for token in range(window.own_begin, window.own_end):
                held = [w for w in found if w.begin <= token < w.end]
                best = max(smaller_side(token, w, num_tokens) for w in held)
                assert smaller_side(token, window, num_tokens) >= best - 1, (num_tokens, room)


def smaller_side(token: int, window: Window, num_tokens: int) -> int:
    """Tokens of context; where the text itself ends, nothing is missing."""
    left = token - window.begin if window.begin else num_tokens
    right = window.end - 1 - token if window.end < num_tokens else num_tokens
    return min(left, right)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("甲\u3000 乙  丙", ["甲", "乙", "丙"]),
        ("叫Riddick的", ["叫", "Riddick", "的"]),
        ("在2020年12", ["在", "2020", "年", "12"]),
        ("甲\u200b乙\u00a0丙", ["甲", "乙", "丙"]),
        ("\U00020000甲", ["\U00020000", "甲"]),
        ("É\u0301té甲", ["É\u0301té", "甲"]),
        ("甲\n乙\u2028丙", ["甲", "乙", "丙"]),
        ("İstanbul 甲", ["İstanbul", "甲"]),
    ],
)
def test_offsets_of_tokens_are_those_of_the_raw_text(
    text: str, expected: list[str], shared_data: Path
) -> None:
    """Spaces, ## pieces, digits, dropped characters, [UNK], accents, lower-casing."""
    tokenizer = Tokenizer(shared_data / "vocab" / "vocab_clue.txt")
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert ids.tolist() == tokenizer.encode(text).tolist()
    for word in expected:
        at = text.index(word)
        span = schemes.covered(offsets, Entity("name", at, at + len(word)))
        assert span is not None
        found = schemes.entity_of(span, offsets)
        # A combining mark at the end belongs to no token.
        assert text[found.start : found.end].rstrip("\u0301") == word.rstrip("\u0301")
    for char in ("\u3000", "\u200b", "\u00a0"):
        if char in text:
            at = text.index(char)
            assert schemes.covered(offsets, Entity("name", at, at + 1)) is None


def config() -> ModelConfig:
    return ModelConfig(
        vocab_size=128,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def test_pointer_scores_only_spans_between_cls_and_sep_whatever_the_padding() -> None:
    network = pointer.BertForEntityPointer(config(), 3).eval()
    ids = torch.randint(5, 128, (1, 7))
    alone = network(ids, lengths=torch.tensor([7]))
    padded = network(torch.nn.functional.pad(ids, (0, 4)), lengths=torch.tensor([7]))
    torch.testing.assert_close(padded[..., :7, :7], alone)
    real = alone > pointer.MASKED / 2
    expected = torch.zeros(7, 7, dtype=torch.bool)
    expected[1:6, 1:6] = torch.ones(5, 5).triu().bool()
    assert (real == expected).all()
    assert (padded[..., 7:, :] == pointer.MASKED).all()
    torch.testing.assert_close(network(ids), alone)


def test_pointer_scores_depend_on_distances_and_not_on_places() -> None:
    x = torch.randn(1, 1, 64).expand(1, 9, 64)
    products = pointer.rotated(x) @ pointer.rotated(x).transpose(1, 2)
    torch.testing.assert_close(products[0, 0, 3], products[0, 4, 7])
    assert not torch.allclose(products[0, 0, 3], products[0, 0, 4])


def test_pointer_loss_is_the_formula_and_learns_overlapping_entities() -> None:
    torch.manual_seed(0)
    raw, truth = torch.randn(2, 3, 4, 4), torch.rand(2, 3, 4, 4) < 0.3
    by_hand = [
        (1 + s[~t].exp().sum()).log() + (1 + (-s[t]).exp().sum()).log()
        for s, t in zip(raw.flatten(0, 1), truth.flatten(0, 1), strict=True)
    ]
    torch.testing.assert_close(pointer.loss(raw, truth), torch.stack(by_hand).mean())
    network = pointer.BertForEntityPointer(config(), 2)
    ids, wanted = torch.arange(10, 18)[None], torch.zeros(1, 2, 8, 8, dtype=torch.bool)
    wanted[0, 0, 1, 5] = wanted[0, 1, 2, 3] = wanted[0, 0, 2, 6] = True
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        pointer.loss(network(ids), wanted).backward()
        optimizer.step()
    assert ((network(ids) > 0) == wanted).all()


# ---------------------------------------------------------------------------------------- scores


def official(gold: list[Label], found: list[Label], types: list[str]) -> float:
    """CLUENER's own formula, as the organizers published it."""
    total = 0.0
    for kind in types:
        right = wrong = missed = 0
        for true, answer in zip(gold, found, strict=True):
            right += len([t for t in answer.get(kind, {}) if t in true.get(kind, {})])
            wrong += len([t for t in answer.get(kind, {}) if t not in true.get(kind, {})])
            missed += len([t for t in true.get(kind, {}) if t not in answer.get(kind, {})])
        precision, recall = right / (right + wrong), right / (right + missed)
        total += 2 * precision * recall / (precision + recall)
    return total / len(types)


def test_the_two_f1_by_hand() -> None:
    """Positions and repetitions don't count in a set of texts; both count in spans."""
    truth: list[Label] = [
        {"name": {"甲": [[0, 0], [3, 3]]}, "company": {"乙": [[1, 1]]}},
        {"name": {"丙": [[0, 0]]}},
    ]
    found: list[Label] = [
        {"name": {"甲": [[3, 3]]}, "company": {"乙": [[5, 5]]}},
        {"company": {"丙": [[0, 0]]}},
    ]
    got = scores.scores(truth, found, TYPES)
    assert got["text_set_f1"] == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert got["span_f1"] == pytest.approx(2 * 1 / (3 + 4))
    assert got["span_precision"] == pytest.approx(1 / 3)
    assert got["span_recall"] == pytest.approx(1 / 4)
    # Never predicted: 0. In no line and never predicted: not in the mean.
    assert scores.scores(truth, [{"name": {"甲": [[0, 0]]}}, {}], (*TYPES, "game"))[
        "text_set_f1"
    ] == pytest.approx((2 / 3 + 0) / 2)
    assert scores.scores([{}], [{}], TYPES)["text_set_f1"] == 0.0


@pytest.fixture(scope="module")
def dev(shared_data: Path) -> list[dict]:
    path = shared_data / "clue" / "cluener_public" / "dev.json"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_entities_of_cluener_are_as_many_as_its_authors_count(dev: list[dict]) -> None:
    """README of CLUENER2020, dev set: a text counts once per line and type."""
    published = {
        "address": 364, "book": 152, "company": 366, "game": 287, "government": 244,
        "movie": 150, "name": 451, "organization": 344, "position": 425, "scene": 199,
    }  # fmt: skip
    truth = []
    for number, row in enumerate(dev):
        found = entities.parse(row["label"], row["text"], tuple(published), f"dev:{number}")
        assert entities.overlaps(found) == []
        truth.append(entities.label_of(found, row["text"]))
    counts = scores.by_type(truth, truth, tuple(published))
    assert {kind: count.true for kind, count in counts.items()} == published
    assert scores.spans(truth, truth).true == 3072


def test_cluener_scores_equal_the_official_formula(dev: list[dict]) -> None:
    """On dev with every fifth entity gone, one in seven moved and one in eleven of another type."""
    draws = random.Random(0)
    truth = [row["label"] for row in dev]
    types = sorted({kind for label in truth for kind in label})
    found = []
    for row in dev:
        kept = []
        for entity in entities.entities_of(row["label"]):
            if draws.random() < 0.2:
                continue
            if draws.random() < 1 / 7:
                entity = entity._replace(end=min(entity.end + 1, len(row["text"])))
            if draws.random() < 1 / 11:
                entity = entity._replace(type=draws.choice(types))
            kept.append(entity)
        found.append(entities.label_of(kept, row["text"]))
    got = scores.scores(truth, found, types)
    assert got["text_set_f1"] == pytest.approx(official(truth, found, types), abs=1e-12)
    triples = [
        Counter((n, *e) for n, label in enumerate(part) for e in entities.entities_of(label))
        for part in (truth, found)
    ]
    right = (triples[0] & triples[1]).total()
    assert got["span_f1"] == pytest.approx(
        2 * right / (triples[0].total() + triples[1].total()), abs=1e-12
    )


def test_baselines() -> None:
    labels: list[Label] = [
        {"name": {"叶老桂": [[0, 2]]}, "company": {"叶": [[3, 3]]}},
        {"company": {"叶老桂": [[0, 2], [4, 6]]}, "name": {"老": [[3, 3]]}},
    ]
    known = baselines.lexicon(labels)
    assert list(known) == [3, 1]
    assert baselines.look_up("叶老桂说叶和老", known) == {
        "company": {"叶老桂": [[0, 2]], "叶": [[4, 4]]},
        "name": {"老": [[6, 6]]},
    }
    assert baselines.look_up("", known) == {}


def test_encode_writes_ids_that_torch_accepts() -> None:
    tags = schemes.encode(3, [Span("name", 1, 2)], schemes.tags(TYPES))
    assert tags.dtype == np.int64 and tags.tolist() == [0, 1, 2]
