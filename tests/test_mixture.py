"""Mixtures and lanes with real corpora: samples in batches, bytes read, errors."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from clue_ds.data import Corpus, Loader, SampleStream
from clue_ds.data.build.command import shard
from clue_ds.data.stream.loader import Skip
from clue_ds.data.stream.mixture import Mixture, open_corpus
from clue_ds.data.stream.readahead import ReadAhead
from clue_ds.data.text.vocab import learn
from clue_ds.errors import UserError
from clue_ds.pretrain.phases import RunPhase, mixture_samples
from clue_ds.settings.phases import Part


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> list[Path]:
    """Two corpora with the same vocabulary and several shards each."""
    directory: Path = tmp_path_factory.mktemp("mixture")
    lines = [line for line in sample_text.splitlines() if line]
    halves = ["", ""]
    for i in range(240):  # the first corpus has three times the second one's documents
        halves[i % 4 == 0] += f"{lines[i % len(lines)]}{i}\n\n"
    vocab = directory / "vocab.txt"
    (directory / "all.txt").write_text(sample_text)
    learn((str(directory / "all.txt"),), output=vocab, size=500)
    for i, text in enumerate(halves):
        (directory / f"{i}.txt").write_text(text)
        shard(
            (str(directory / f"{i}.txt"),),
            output=directory / f"part{i}",
            vocab=vocab,
            workers=1,
            shard_megabytes=0.004,
        )
    return [directory / "part0", directory / "part1"]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def mixture(directories: list[Path], share: float = 0.3) -> Mixture:
    opened = open_corpus(directories[0], {str(directories[1]): share})
    assert isinstance(opened, Mixture)
    return opened


def test_a_mixture_holds_its_shares_of_both(directories: list[Path]) -> None:
    """Each corpus has its share of the windows, counted in the rows themselves."""
    mixed = mixture(directories)
    stream = SampleStream(mixed, 16, 64, seed=3)
    windows = [
        {
            tuple((tokens[i : i + 14] & 0x7FFF).tolist())
            for tokens in (one.tokens for one in corpus.shards)
            for i in range(0, len(tokens), 14)
        }
        for corpus in mixed.corpora
    ]
    counts = [0, 0]
    for step in range(40):
        batch = stream.batch(step)
        ids, positions = batch["input_ids"].clone(), batch["masked_positions"]
        used = batch["masked_labels"] >= 0
        rows = torch.arange(len(ids))[:, None].expand_as(positions)
        ids[rows[used], positions[used]] = batch["masked_labels"][used]
        for row, length in zip(ids, batch["lengths"], strict=True):
            window = tuple(row[1 : length - 1].tolist())
            homes = [window in of_corpus for of_corpus in windows]
            assert any(homes)
            if sum(homes) == 1:
                counts[homes.index(True)] += 1
    taken = stream.samples_by_part(40)
    assert sum(taken) == 40 * 64
    assert taken[1] == pytest.approx(0.3 * 40 * 64, rel=0.1)
    # The few windows that both corpora have are not counted.
    assert counts[0] <= taken[0] and counts[1] <= taken[1]
    assert sum(counts) > 0.5 * sum(taken)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("mixed", [False, True])
def test_loader_reads_lanes_of_any_world_size(
    directories: list[Path], world_size: int, mixed: bool
) -> None:
    """Loaders of any world size, started in the middle, together give the batches of the stream."""
    corpus = mixture(directories) if mixed else Corpus(directories[0])
    stream = SampleStream(corpus, 16, 64, seed=3, order="lanes")
    loaders = [Loader(stream, rank, world_size, start_step=7) for rank in range(world_size)]
    for step in range(7, 12):
        batches = [next(loader) for loader in loaders]
        joined = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        assert same(joined, SampleStream(corpus, 16, 64, seed=3, order="lanes").batch(step))
    for loader in loaders:
        loader.close()


def test_read_ahead_reads_each_byte_once_an_epoch(
    directories: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clue_ds.data.stream.sample_stream.BLOCK_BYTES", 56)  # two samples a block
    corpus = Corpus(directories[0])
    stream = SampleStream(corpus, 16, 8, seed=0, order="lanes")
    num_bytes = sum(one.tokens.nbytes for one in corpus.shards)
    reader = ReadAhead(stream, 0, 1)
    for step in range(stream.num_samples // 8):
        reader.wait(step)
    reader.close()
    # Near the end, the first windows of the next epoch are read: 16 samples for each of 8 lanes.
    assert num_bytes <= reader.bytes_read <= num_bytes + 8 * 16 * 28


def test_a_file_cut_off_while_in_use_is_an_error(directories: list[Path], tmp_path: Path) -> None:
    copy = shutil.copytree(directories[0], tmp_path / "copy")
    stream = SampleStream(Corpus(copy), 16, 8, seed=0, order="lanes")
    victim = copy / "shard-000001.bin"
    with open(victim, "r+b") as file:
        file.truncate(100)
    loader = Loader(stream)
    with pytest.raises(UserError, match=r"shard-000001.bin ends at byte"):
        for _ in range(stream.num_samples // 8):
            next(loader)


def test_auto_depends_on_the_corpus_alone(
    directories: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = Corpus(directories[0])
    assert not SampleStream(corpus, 16, 8, seed=0).uses_lanes
    monkeypatch.setattr("clue_ds.data.stream.sample_stream.LANES_FROM_BYTES", corpus.num_bytes - 1)
    assert SampleStream(corpus, 16, 8, seed=0).uses_lanes
    assert not SampleStream(corpus, 16, 8, seed=0, order="shuffle").uses_lanes
    with pytest.raises(UserError, match="order 'sorted' is none of auto, shuffle, lanes"):
        SampleStream(corpus, 16, 8, seed=0, order="sorted")


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 0.00049, 0.12345])
def test_shares_are_thousandths(directories: list[Path], share: float) -> None:
    with pytest.raises(UserError, match=r"must be a multiple of 0\.001 between 0 and 1"):
        mixture(directories, share)


def test_shares_must_leave_something(directories: list[Path], tmp_path: Path) -> None:
    third = shutil.copytree(directories[1], tmp_path / "third")
    with pytest.raises(UserError, match=r"add up to 1\.1, which leaves nothing for .*part0"):
        Mixture(Corpus(directories[0]), {str(directories[1]): 0.6, str(third): 0.5})


def test_corpora_need_one_vocabulary(
    directories: list[Path], tmp_path: Path, sample_text: str
) -> None:
    (tmp_path / "text.txt").write_text(sample_text)
    text = (str(tmp_path / "text.txt"),)
    learn(text, output=tmp_path / "vocab.txt", size=120)
    shard(text, output=tmp_path / "other", vocab=tmp_path / "vocab.txt", workers=1)
    one, other = Corpus(directories[0]), Corpus(tmp_path / "other")
    with pytest.raises(UserError, match=f"{one.vocab_sha256}.*{other.vocab_sha256}"):
        Mixture(one, {str(tmp_path / "other"): 0.5})


def test_fingerprint_is_of_corpora_and_shares(directories: list[Path]) -> None:
    prints = {mixture(directories, share).fingerprint for share in (0.3, 0.4)}
    prints |= {mixture(directories[::-1]).fingerprint, Corpus(directories[0]).fingerprint}
    assert len(prints) == 4
    assert mixture(directories).fingerprint in prints
    assert np.array_equal(mixture(directories).shares, [700, 300])


def test_samples_that_a_run_skipped_are_not_counted_for_any_corpus(directories: list[Path]) -> None:
    """Also read ahead: the batches behind a skip come from other windows of the lanes."""
    stream = SampleStream(mixture(directories), 16, 64, seed=3, order="lanes")
    whole_run = RunPhase(Part(0, 0, 100, {}, 0, 0), 1, None, stream, None)  # type: ignore[arg-type]
    skips = [Skip(4, 7), Skip(4, 2), Skip(6, 30)]
    numbers = [0, 1, 2, 3, 13, 14, 45, 46]
    expected = [0, 0]
    with Loader(stream, skips=skips) as loader:
        for step, number in enumerate(numbers):
            assert same(next(loader), stream.batch(number))
            before, after = stream.samples_by_part(number), stream.samples_by_part(number + 1)
            expected = [e + a - b for e, a, b in zip(expected, after, before, strict=True)]
            assert list(mixture_samples([whole_run], step + 1, skips).values()) == expected
    assert sum(expected) == len(numbers) * 64
