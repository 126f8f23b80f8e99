"""The sample stream: each sample once per epoch, the same batch for any world size, O(1) seek."""

from __future__ import annotations

import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_masking import plain_derive

from clue_ds.data import Corpus, SampleStream
from clue_ds.data.build.command import shard
from clue_ds.data.stream.order import NUM_ROUNDS, permutation
from clue_ds.data.text.vocab import learn
from clue_ds.errors import UserError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> Corpus:
    """Some 9,000 tokens in several shards, without two equal windows of 14 tokens."""
    directory = tmp_path_factory.mktemp("sample_stream")
    lines = [line for line in sample_text.split("\n") if line]
    rng = random.Random(0)
    text = "".join(
        f"{rng.choice(lines)}{rng.randrange(10**6)}\n" + ("\n" if i % 5 == 0 else "")
        for i in range(300)
    )
    (directory / "text.txt").write_text(text)
    learn((str(directory / "text.txt"),), output=directory / "vocab.txt", size=800)
    shard(
        (str(directory / "text.txt"),),
        output=directory / "corpus",
        vocab=directory / "vocab.txt",
        workers=1,
        shard_megabytes=0.006,
    )
    opened = Corpus(directory / "corpus")
    assert len(opened.shards) > 2
    return opened


def plain_permute(index: int, num: int, key: int) -> int:
    """The rule of `_permute` in plain Python integers."""
    radices = [math.ceil(math.sqrt(num))]
    radices.append(-(-num // radices[0]))
    while True:
        halves = list(divmod(index, radices[1]))
        for number in range(NUM_ROUNDS):
            changed, other = (0, 1) if number % 2 == 0 else (1, 0)
            draw = plain_derive(plain_derive(key, number), halves[other])
            offset = ((draw >> 32) * radices[changed]) >> 32
            halves[changed] = (halves[changed] + offset) % radices[changed]
        index = halves[0] * radices[1] + halves[1]
        if index < num:
            return index


@settings(max_examples=60, deadline=None)
@given(num=st.integers(1, 2000), key=st.integers(0, (1 << 64) - 1))
def test_permutation_is_one_and_equals_its_twin(num: int, key: int) -> None:
    places = permutation(num, np.uint64(key))
    assert sorted(places) == list(range(num))
    for index in range(0, num, 1 + num // 10):
        assert places[index] == plain_permute(index, num, key)


def test_permutation_looks_random() -> None:
    """Like a uniform shuffle in its fixed points, descents and displacement, over 400 keys."""
    num, num_keys = 200, 400
    shuffles = np.stack([permutation(num, np.uint64(key)) for key in range(num_keys)])
    fixed = (shuffles == np.arange(num)).sum()  # per shuffle: mean 1, variance 1
    assert abs(fixed - num_keys) < 4 * math.sqrt(num_keys)
    descents = (np.diff(shuffles, axis=1) < 0).sum()  # mean (n-1)/2, variance (n+1)/12
    assert abs(descents - num_keys * (num - 1) / 2) < 4 * math.sqrt(num_keys * (num + 1) / 12)
    for column in (0, 1, 99, 198, 199):  # where one sample goes is uniform
        mean = shuffles[:, column].mean()
        assert abs(mean - (num - 1) / 2) < 4 * math.sqrt((num**2 - 1) / 12 / num_keys)


def windows(corpus: Corpus, seq_length: int) -> Counter[tuple[int, ...]]:
    """All windows of the corpus, read from the shards without the stream."""
    result: Counter[tuple[int, ...]] = Counter()
    for one in corpus.shards:
        ids = (one.tokens & 0x7FFF).tolist()
        for begin in range(0, len(ids), seq_length - 2):
            result[tuple(ids[begin : begin + seq_length - 2])] += 1
    return result


def unmasked(batch: dict[str, torch.Tensor]) -> list[tuple[int, ...]]:
    """The tokens of each row with the labels put back."""
    ids = batch["input_ids"].clone()
    rows = torch.arange(len(ids))[:, None].expand_as(batch["masked_positions"])
    used = batch["masked_labels"] >= 0
    ids[rows[used], batch["masked_positions"][used]] = batch["masked_labels"][used]
    return [
        tuple(row[1 : length - 1].tolist())
        for row, length in zip(ids, batch["lengths"], strict=True)
    ]


@settings(max_examples=12, deadline=None)
@given(
    seq_length=st.sampled_from([3, 16, 33, 128, 5000]),
    global_batch_size=st.integers(1, 70),
    seed=st.integers(0, 1 << 70),
    whole_word=st.booleans(),
)
def test_each_sample_once_an_epoch(
    corpus: Corpus, seq_length: int, global_batch_size: int, seed: int, whole_word: bool
) -> None:
    """Batches straddle epochs; cut the stream at multiples of num_samples to see each epoch."""
    stream = SampleStream(corpus, seq_length, global_batch_size, seed, whole_word)
    expected = windows(corpus, seq_length)
    assert stream.num_samples == expected.total()
    assert stream.steps_per_epoch == math.ceil(stream.num_samples / global_batch_size)
    num_steps = math.ceil(2 * stream.num_samples / global_batch_size)
    samples = [row for step in range(num_steps) for row in unmasked(stream.batch(step))]
    for epoch in range(2):
        begin = epoch * stream.num_samples
        assert Counter(samples[begin : begin + stream.num_samples]) == expected
    orders = [samples[e * stream.num_samples : (e + 1) * stream.num_samples] for e in range(2)]
    # With length 5000 there are so few samples that two epochs may have the same order by chance.
    assert orders[0] != orders[1] or stream.num_samples < 20


@settings(max_examples=20, deadline=None)
@given(
    step=st.integers(0, 10**12),
    world_size=st.sampled_from([1, 2, 3, 4, 6, 12]),
    seed=st.integers(0, 100),
    whole_word=st.booleans(),
)
def test_any_world_size_sees_the_same_batch(
    corpus: Corpus, step: int, world_size: int, seed: int, whole_word: bool
) -> None:
    whole = SampleStream(corpus, 32, 12, seed, whole_word).batch(step)
    fresh = SampleStream(corpus, 32, 12, seed, whole_word)  # nothing is carried from call to call
    fresh.batch(step + 1)
    parts = [fresh.batch(step, rank, world_size) for rank in range(world_size)]
    for name, tensor in whole.items():
        assert torch.equal(tensor, torch.cat([part[name] for part in parts])), name


def test_batch_size_does_not_change_the_stream(corpus: Corpus) -> None:
    """Position p of the stream is the same sample with the same mask for any batch size."""
    small, large = (SampleStream(corpus, 32, size, 1) for size in (4, 12))
    expected = large.batch(5)
    batches = [small.batch(step) for step in (15, 16, 17)]
    for name, tensor in expected.items():
        assert torch.equal(tensor, torch.cat([batch[name] for batch in batches])), name


def test_shapes_types_and_padding(corpus: Corpus) -> None:
    stream = SampleStream(corpus, 128, 8, 0)
    assert stream.num_predictions == 20
    for step in range(stream.steps_per_epoch):
        batch = stream.batch(step)
        shapes = {name: tuple(tensor.shape) for name, tensor in batch.items()}
        assert shapes == {
            "input_ids": (8, 128),
            "lengths": (8,),
            "masked_positions": (8, 20),
            "masked_labels": (8, 20),
        }
        assert all(tensor.dtype == torch.int64 for tensor in batch.values())
        for row, length in zip(batch["input_ids"], batch["lengths"], strict=True):
            assert row[0] == 101
            assert row[length - 1] == 102
            assert not row[length:].any()
            assert row.max() < corpus.vocab_size
        assert not stream.arrays(step)["token_type_ids"].any()


def test_masks_differ_between_epochs(corpus: Corpus) -> None:
    stream = SampleStream(corpus, 64, 1, 3)
    seen: dict[tuple[int, ...], list[int]] = {}
    for step in range(2 * stream.num_samples):
        batch = stream.batch(step)
        sample, positions = unmasked(batch)[0], batch["masked_positions"][0].tolist()
        if len(sample) == 62 and step >= stream.num_samples:
            assert seen[sample] != positions
        seen[sample] = positions


def test_random_tokens_are_ordinary(corpus: Corpus) -> None:
    """No [unused] token and no special token except [MASK] ever replaces a token."""
    stream = SampleStream(corpus, 128, 64, 0, mask_prob=0.9)
    for step in range(20):
        batch = stream.batch(step)
        ids = batch["input_ids"].clone()
        for row, length in zip(ids, batch["lengths"], strict=True):
            inside = row[1 : length - 1]
            assert set(inside[inside < 104].tolist()) <= {100, 103}  # [UNK] of the text, [MASK]


def test_settings_that_make_no_sense(corpus: Corpus) -> None:
    cases: list[tuple[dict[str, float | str], str]] = [
        ({"seq_length": 2}, "seq_length 2"),
        ({"global_batch_size": 0}, "global_batch_size 0"),
        ({"mask_prob": 1.5}, "mask_prob 1.5"),
        ({"predictions_per_sequence": 0}, "predictions_per_sequence 0"),
        ({"samples": "typo"}, "samples 'typo' is no kind of samples; give one of windows"),
    ]
    for change, message in cases:
        arguments = {"seq_length": 32, "global_batch_size": 8, "seed": 0, **change}
        with pytest.raises(UserError, match=message):
            SampleStream(corpus, **arguments)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="not divisible by 3 ranks"):
        SampleStream(corpus, 32, 8, 0).batch(0, 0, 3)


def test_same_result_from_a_copy_elsewhere(corpus: Corpus, tmp_path: Path) -> None:
    import shutil

    copy = Corpus(shutil.copytree(corpus.directory, tmp_path / "copy"))
    assert copy.fingerprint == corpus.fingerprint
    one, other = (SampleStream(c, 32, 8, 0).batch(3) for c in (corpus, copy))
    assert all(torch.equal(one[name], other[name]) for name in one)
