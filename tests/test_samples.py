"""Kinds of samples: each compared with a plain reading of the corpus, each text once per epoch."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clue_ds.data import Corpus, SampleStream
from clue_ds.data.build.command import shard
from clue_ds.data.stream.samples import KINDS, POSITIONS_A_SEQUENCE
from clue_ds.data.text.vocab import learn

CLS, SEP = 101, 102
Text = tuple[int, ...]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> Corpus:
    """Documents of 1 to 40 sentences in several shards; sentences of 1 to some 150 tokens."""
    directory = tmp_path_factory.mktemp("samples")
    lines = [line for line in sample_text.split("\n") if line]
    rng = random.Random(1)
    documents = []
    for i in range(160):
        sentences = []
        for _ in range(rng.choice([1, 1, 2, 3, 5, 8, 40])):
            texts = [rng.choice(lines) for _ in range(rng.choice([1, 1, 1, 4]))]
            sentences.append(
                "".join(texts)[: rng.choice([1, 20, 60, 400])] + str(rng.randrange(99))
            )
        documents.append("\n".join(sentences) + f"\n{i}")
    (directory / "text.txt").write_text("\n\n".join(documents) + "\n")
    learn((str(directory / "text.txt"),), output=directory / "vocab.txt", size=800)
    shard(
        (str(directory / "text.txt"),),
        output=directory / "corpus",
        vocab=directory / "vocab.txt",
        workers=1,
        shard_megabytes=0.03,
    )
    opened = Corpus(directory / "corpus")
    assert len(opened.shards) > 1
    return opened


def documents_of(corpus: Corpus) -> list[list[list[Text]]]:
    """The sentences of each document of each shard, read from the arrays as documented."""
    shards = []
    for one in corpus.shards:
        ids = (one.tokens & 0x7FFF).tolist()
        ends = [0, *one.sentence_ends.tolist()]
        sentences = [tuple(ids[a:b]) for a, b in zip(ends, ends[1:], strict=False)]
        stops = [0, *one.document_ends.tolist()]
        shards.append([sentences[a:b] for a, b in zip(stops, stops[1:], strict=False)])
    return shards


def greedy(sentences: list[Text], width: int) -> list[Text]:
    """Spans of as many whole sentences as fit; a sentence longer than `width` is cut."""
    rest = [list(sentence) for sentence in sentences]
    spans = []
    while rest:
        span: list[int] = []
        while rest and len(span) + len(rest[0]) <= width:
            span += rest.pop(0)
        if not span:
            span, rest[0] = rest[0][:width], rest[0][width:]
        spans.append(tuple(span))
    return spans


def expected_samples(corpus: Corpus, kind: str, width: int) -> Counter[Text]:
    result: Counter[Text] = Counter()
    for documents in documents_of(corpus):
        whole = [sum(documents, [])] if kind == "sentences" else documents
        for sentences in whole:
            result.update(greedy(sentences, width))
    return result


def unmasked(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    """Rows from [CLS] to the last [SEP] with the labels put back."""
    ids = batch["input_ids"].clone()
    rows = torch.arange(len(ids))[:, None].expand_as(batch["masked_positions"])
    used = batch["masked_labels"] >= 0
    ids[rows[used], batch["masked_positions"][used]] = batch["masked_labels"][used]
    return [row[:n].tolist() for row, n in zip(ids, batch["lengths"], strict=True)]


def epoch_of(stream: SampleStream, epoch: int = 0) -> list[tuple[list[int], dict[str, list[int]]]]:
    """The rows of an epoch with their other batch entries, from a stream of batch size 1."""
    assert stream.global_batch_size == 1
    found = []
    for step in range(epoch * stream.num_samples, (epoch + 1) * stream.num_samples):
        batch = stream.batch(step)
        found.append((unmasked(batch)[0], {k: v[0].tolist() for k, v in batch.items()}))
    return found


@pytest.mark.parametrize("kind", ["sentences", "documents"])
@pytest.mark.parametrize("seq_length", [8, 33, 128, 512])
def test_whole_sentences_once_an_epoch(corpus: Corpus, kind: str, seq_length: int) -> None:
    stream = SampleStream(corpus, seq_length, 1, 0, samples=kind)  # type: ignore[arg-type]
    expected = expected_samples(corpus, kind, seq_length - 2)
    assert stream.num_samples == expected.total()
    for epoch in (0, 1):
        rows = [row for row, _ in epoch_of(stream, epoch)]
        assert all(row[0] == CLS and row[-1] == SEP for row in rows)
        assert Counter(tuple(row[1:-1]) for row in rows) == expected


@pytest.mark.parametrize("seq_length", [16, 128, 512])
def test_packed_rows_hold_documents_that_stay_whole_where_they_fit(
    corpus: Corpus, seq_length: int
) -> None:
    stream = SampleStream(corpus, seq_length, 1, 0, samples="packed")
    spans: Counter[Text] = Counter()
    num_sequences = 0
    for row, batch in epoch_of(stream):
        ends = batch["cu_seqlens"]
        assert len(ends) == max(1, seq_length // POSITIONS_A_SEQUENCE) + 1
        assert ends[0] == 0 and ends[-1] == len(row)
        for begin, end in zip(ends, ends[1:], strict=False):
            if begin < end:
                assert row[begin] == CLS and row[end - 1] == SEP
                spans[tuple(row[begin + 1 : end - 1])] += 1
                num_sequences += 1
    documents = [sum(d, ()) for documents in documents_of(corpus) for d in documents]
    assert sum(len(p) * n for p, n in spans.items()) == corpus.num_tokens
    short = Counter(d for d in documents if len(d) + 2 <= seq_length)
    assert all(spans[d] >= n for d, n in short.items())
    cut = spans - short
    assert all(any(len(d) + 2 > seq_length and contains(d, p) for d in documents) for p in cut)
    assert num_sequences > stream.num_samples or seq_length == 16


def contains(text: Text, span: Text) -> bool:
    return any(text[i : i + len(span)] == span for i in range(len(text) - len(span) + 1))


def split_pair(row: list[int], types: list[int]) -> tuple[Text, Text]:
    middle = types.index(1)
    assert row[0] == CLS and row[middle - 1] == SEP and row[-1] == SEP
    assert types == [0] * middle + [1] * (len(row) - middle) + [0] * (len(types) - len(row))
    return tuple(row[1 : middle - 1]), tuple(row[middle:-1])


@pytest.mark.parametrize("seq_length", [33, 128])
def test_sentence_order_swaps_half_of_the_pairs(corpus: Corpus, seq_length: int) -> None:
    """Put back in order, A and B are the spans of the documents, each once an epoch."""
    stream = SampleStream(corpus, seq_length, 1, 0, samples="sop")
    joined: Counter[Text] = Counter()
    counts: Counter[int] = Counter()
    splits = set()
    for epoch in range(4):
        seen: Counter[Text] = Counter()
        for row, batch in epoch_of(stream, epoch):
            a, b = split_pair(row, batch["token_type_ids"])
            label = batch["next_sentence_label"]
            seen[b + a if label == 1 else a + b] += 1
            counts[label] += 1
            splits.add((a, b))
        assert not joined or seen == joined
        joined = seen
    assert joined == expected_samples(corpus, "sop", seq_length - 3)
    num = counts[0] + counts[1]
    assert abs(counts[1] - num / 2) < 4 * (num / 4) ** 0.5
    assert len(splits) > 1.5 * stream.num_samples  # a span is split elsewhere in other epochs


@pytest.mark.parametrize("seq_length", [33, 128])
def test_next_sentence_takes_half_of_the_bs_from_other_documents(
    corpus: Corpus, seq_length: int
) -> None:
    stream = SampleStream(corpus, seq_length, 1, 0, samples="nsp")
    shards = [[sum(d, ()) for d in documents] for documents in documents_of(corpus)]
    expected = expected_samples(corpus, "nsp", seq_length - 3)
    whole: Counter[Text] = Counter()
    counts: Counter[int] = Counter()
    for row, batch in epoch_of(stream):
        a, b = split_pair(row, batch["token_type_ids"])
        label = batch["next_sentence_label"]
        counts[label] += 1
        if label == 1:
            homes = [i for i, texts in enumerate(shards) if any(contains(t, a) for t in texts)]
            assert any(contains(t, b) for i in homes for t in shards[i]), "from the same shard"
            assert b and len(row) <= seq_length
        else:
            whole[a + b] += 1
    assert not whole - expected
    num = counts[0] + counts[1]
    assert abs(counts[1] - num / 2) < 4 * (num / 4) ** 0.5


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    step=st.integers(0, 10**9),
    world_size=st.sampled_from([2, 3, 4]),
    seed=st.integers(0, 9),
)
def test_any_world_size_sees_the_same_batch(
    corpus: Corpus, kind: str, step: int, world_size: int, seed: int
) -> None:
    def stream() -> SampleStream:
        return SampleStream(corpus, 64, 12, seed, max_ngram=3, samples=kind)  # type: ignore[arg-type]

    whole, fresh = stream().batch(step), stream()
    fresh.batch(step + 1)  # calls share no state
    batches = [fresh.batch(step, rank, world_size) for rank in range(world_size)]
    for name, tensor in whole.items():
        assert tensor.dtype == torch.int64
        assert torch.equal(tensor, torch.cat([batch[name] for batch in batches])), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("seq_length", "num"), [(128, 20), (512, 77)])
def test_prediction_counts_are_fixed(corpus: Corpus, kind: str, seq_length: int, num: int) -> None:
    stream = SampleStream(corpus, seq_length, 16, 0, samples=kind)  # type: ignore[arg-type]
    for step in range(6):
        batch = stream.batch(step)
        assert batch["masked_labels"].shape == (16, num)
        ids = np.array([row + [0] * (seq_length - len(row)) for row in unmasked(batch)])
        maskable = (~np.isin(ids, [0, 100, CLS, SEP])).sum(1)
        goal = np.ceil(0.15 * batch["lengths"].numpy() - 1e-9)
        predicted = (batch["masked_labels"] >= 0).sum(1).numpy()
        assert predicted.tolist() == np.minimum.reduce([goal, maskable, [num] * 16]).tolist()
        assert not np.isin(batch["masked_labels"], [100, CLS, SEP]).any()


@pytest.mark.parametrize("kind", ["windows", "documents", "packed", "sop"])
def test_where_samples_lie_is_known_beforehand(corpus: Corpus, kind: str) -> None:
    """The tokens that are read ahead for a range of samples are theirs and few others."""
    stream = SampleStream(corpus, 16, 1, 0, samples=kind)  # type: ignore[arg-type]
    whole = list(stream.token_runs(0, stream.num_samples))
    assert whole == [(i, 0, len(one.tokens)) for i, one in enumerate(corpus.shards)]
    reach = 0 if kind == "windows" else 64
    for first in range(0, stream.num_samples, 50):
        last = min(first + 30, stream.num_samples)
        num = sum(end - begin for _, begin, end in stream.token_runs(first, last))
        assert 0 < num <= (last - first + 2 * reach) * 16 * (2 if kind == "packed" else 1)
