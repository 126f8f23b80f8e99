"""Indexes of where samples begin: same samples from a file, and a damaged file is made again."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from clue_ds.benchmarks.synthetic import write_corpus
from clue_ds.data import Corpus, SampleStream
from clue_ds.data.stream import sample_index
from clue_ds.data.stream.mixture import Mixture
from clue_ds.data.stream.samples import KINDS

INDEXED = [kind for kind in KINDS if kind != "windows"]

OPEN = """
import sys
from clue_ds.data import Corpus, SampleStream
from clue_ds.data.stream import sample_index
sample_index.KEPT_FROM = 1
stream = SampleStream(Corpus(sys.argv[1]), 64, 8, 0, samples="documents", order="shuffle")
print(stream.arrays(5)["input_ids"].sum())
"""


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A corpus; its indexes are kept, and a cache of its own stands in for the user's."""
    write_corpus(tmp_path / "corpus", 60_000, 3, holes="nothing")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sample_index, "KEPT_FROM", 1)
    return tmp_path / "corpus"


def batches(directory: Path, kind: str = "documents", **options: int) -> list[np.ndarray]:
    stream = SampleStream(Corpus(directory), 64, 8, 0, samples=kind, **options)  # type: ignore[arg-type]
    last = stream.steps_per_epoch - 1
    return [array for step in (0, last) for array in stream.arrays(step).values()]


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", INDEXED)
def test_kept_and_read_again(
    directory: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(directory.iterdir())
    with monkeypatch.context() as context:
        context.setattr(sample_index, "KEPT_FROM", 10**9)
        expected = batches(directory, kind)
    assert not directory.with_name("corpus.index").exists()
    assert same(batches(directory, kind), expected)
    assert "indexing the 1,5" in capsys.readouterr().err
    # From here on a walk over the corpus fails: the index must come from the file.
    monkeypatch.setattr(sample_index, "index_shard", None)
    assert same(batches(directory, kind), expected)
    assert capsys.readouterr().err == ""
    assert sorted(directory.iterdir()) == before, "the corpus is not touched"


def test_sizes_have_indexes_of_their_own(directory: Path) -> None:
    for kind in INDEXED:
        batches(directory, kind)
    names = sorted(path.name for path in directory.with_name("corpus.index").glob("*.bin"))
    # nsp and sop cut documents in the same way, with one [SEP] more than documents do.
    assert names == ["documents-61.bin", "documents-62.bin", "packed-64.bin", "sentences-62.bin"]


def test_every_flipped_bit_and_cut_is_noticed(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = batches(directory)
    (path,) = directory.with_name("corpus.index").glob("*.bin")
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    damaged = [whole[: rng.integers(len(whole))] for _ in range(10)]
    for place in rng.integers(8 * len(whole), size=60).tolist():
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        damaged.append(bytes(flipped))
    for content in damaged:
        path.write_bytes(content)
        capsys.readouterr()
        assert same(batches(directory), expected)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 2 and str(path) in lines[0] and "it is made again" in lines[0]
        assert path.read_bytes() == whole


def test_an_index_of_another_corpus_is_stale(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    batches(directory)
    shutil.rmtree(directory)
    write_corpus(directory, 50_000, 2, holes="nothing")
    capsys.readouterr()
    batches(directory)
    assert "belongs to another state of the corpus; it is made again" in capsys.readouterr().err


def test_where_nothing_can_be_written_beside_the_corpus(directory: Path) -> None:
    directory.with_name("corpus.index").write_text("in the way")
    batches(directory)
    (kept,) = (directory.parent / "cache" / "clue_ds").glob("*.index/documents-62.bin")
    assert kept.parent.name == f"{Corpus(directory).fingerprint[:16]}.index"


def test_nothing_is_written_into_the_corpus_around_held_out_text(directory: Path) -> None:
    write_corpus(directory / "held_out", 20_000, 1, holes="nothing")
    before = sorted(directory.iterdir())
    batches(directory / "held_out")
    assert sorted(directory.iterdir()) == before
    assert list((directory.parent / "cache" / "clue_ds").glob("*.index/documents-62.bin"))


def test_no_place_at_all(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = batches(directory)
    shutil.rmtree(directory.with_name("corpus.index"))
    directory.with_name("corpus.index").write_text("in the way")
    (directory.parent / "cache").write_text("in the way")
    capsys.readouterr()
    assert same(batches(directory), expected)
    assert "made again at each start" in capsys.readouterr().err


def test_corpora_of_a_mixture_use_their_own(directory: Path) -> None:
    write_corpus(directory.with_name("other"), 30_000, 2, holes="nothing")
    mixture = Mixture(Corpus(directory), {str(directory.with_name("other")): 0.25})
    made, read = (SampleStream(mixture, 64, 8, 0, samples="packed") for _ in range(2))
    assert directory.with_name("other.index").is_dir()
    for step in range(made.steps_per_epoch):
        assert same(list(made.arrays(step).values()), list(read.arrays(step).values()))


def test_processes_that_start_together_make_it_once(directory: Path) -> None:
    command = [sys.executable, "-c", OPEN, str(directory)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(3)]  # type: ignore[call-overload]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert len({out for out, _ in outputs}) == 1
    assert sum("indexing the" in err for _, err in outputs) == 1, outputs
    assert not list(directory.with_name("corpus.index").glob("*.tmp"))
