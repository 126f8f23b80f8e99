"""The format on disk: its bytes, the documented reader, and how damage is found."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rjieba

from clue_ds import files
from clue_ds.data import Corpus
from clue_ds.data.build.command import shard
from clue_ds.data.corpus import MAGIC, ShardArrays, fingerprint, write_shard
from clue_ds.data.text.special_tokens import LEADING_TOKENS
from clue_ds.data.text.vocab import learn
from clue_ds.errors import UserError

DOCS = Path(__file__).resolve().parents[1] / "docs" / "shard-format.md"


@pytest.fixture
def corpus(tmp_path: Path, sample_text: str) -> Path:
    (tmp_path / "text.txt").write_text(sample_text)
    text = (str(tmp_path / "text.txt"),)
    learn(text, output=tmp_path / "vocab.txt", size=400, min_frequency=1)
    output = tmp_path / "corpus"
    shard(text, output=output, vocab=tmp_path / "vocab.txt", workers=1, shard_megabytes=0.0005)
    return output


def manifest(corpus: Path) -> dict:
    return json.loads((corpus / "corpus.json").read_text())


def test_attributes_of_a_corpus(corpus: Path, sample_text: str) -> None:
    opened = Corpus(corpus)
    lines = [line for line in sample_text.split("\n") if line]
    assert opened.num_sentences == len(lines)
    assert opened.num_documents == 4
    assert opened.num_tokens == sum(len(s.tokens) for s in opened.shards)
    assert len(opened.shards) > 1
    assert opened.lower_case is True
    assert opened.vocab_sha256 == files.sha256(opened.vocab_file)
    assert opened.vocab_size == len(opened.vocab_file.read_text().splitlines())
    assert re.fullmatch("[0-9a-f]{64}", opened.fingerprint)
    opened.verify()


def test_the_documented_reader_reads_it(corpus: Path, sample_text: str) -> None:
    """The example of docs/shard-format.md, run unchanged, prints jieba's words."""
    code = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), flags=re.DOTALL)[-1]
    result = subprocess.run(
        [sys.executable, "-c", code, str(corpus)], capture_output=True, text=True, check=True
    )
    lines = [line for line in sample_text.split("\n") if line]
    assert result.stdout.splitlines() == [" ".join(rjieba.cut(line.lower())) for line in lines]


def test_documented_layout(tmp_path: Path) -> None:
    """Byte for byte: a change here is a new format version."""
    arrays = ShardArrays(
        np.array([5, 0x8006, 7], np.uint16), np.array([2, 3]), np.array([1, 2], np.int64)
    )
    record = write_shard(tmp_path / "s.bin", arrays)
    data = (tmp_path / "s.bin").read_bytes()
    integers = b"".join(n.to_bytes(8, "little") for n in (2, 3, 2, 2))
    assert data[:64] == (MAGIC + integers).ljust(64, b"\0")
    assert data[64:128] == b"\5\0\6\x80\7\0".ljust(64, b"\0")
    assert data[128:192] == b"\2\0\0\0\3\0\0\0".ljust(64, b"\0")
    assert data[192:] == b"\1\0\0\0\2\0\0\0"
    assert record[1:5] == (3, 2, 2, len(data))
    assert [p.name for p in tmp_path.iterdir()] == ["s.bin"]


def first_shard(corpus: Path) -> Path:
    return min(corpus.glob("shard-*.bin"))


def test_truncated_shard_is_an_error_before_the_map(corpus: Path) -> None:
    path = first_shard(corpus)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{path.name} has .* bytes where corpus.json says"):
        Corpus(corpus)


@pytest.mark.parametrize(("offset", "what"), [(0, "magic"), (8, "token bytes"), (17, "tokens")])
def test_header_that_disagrees(corpus: Path, offset: int, what: str) -> None:
    path = first_shard(corpus)
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{path.name} does not have the header"):
        Corpus(corpus)


def test_flipped_bit_is_found_by_verify(corpus: Path) -> None:
    path = first_shard(corpus)
    data = bytearray(path.read_bytes())
    data[64] ^= 1
    path.write_bytes(data)
    opened = Corpus(corpus)
    with pytest.raises(UserError, match=f"damaged: {path.name} changed"):
        opened.verify()


def test_changed_manifest_is_found_by_verify(corpus: Path) -> None:
    changed = manifest(corpus)
    changed["fingerprint"] = "0" * 64
    files.write_json(corpus / "corpus.json", changed)
    with pytest.raises(UserError, match="damaged: corpus.json"):
        Corpus(corpus).verify()


def test_missing_or_foreign_files(corpus: Path) -> None:
    vocab = (corpus / "vocab.txt").read_bytes()
    (corpus / "vocab.txt").write_bytes(vocab + "新\n".encode())
    with pytest.raises(UserError, match="is not the vocabulary that corpus"):
        Corpus(corpus)
    (corpus / "vocab.txt").unlink()
    with pytest.raises(UserError, match="lacks its vocab.txt"):
        Corpus(corpus)
    (corpus / "vocab.txt").write_bytes(vocab)
    first_shard(corpus).unlink()
    with pytest.raises(UserError, match="lacks shard-"):
        Corpus(corpus)


def test_directories_that_are_not_a_corpus(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; make one with"):
        Corpus(tmp_path / "none")
    with pytest.raises(UserError, match="is not a corpus: it has no corpus.json"):
        Corpus(tmp_path)
    path = corpus / "corpus.json"
    whole = path.read_text()
    path.write_text(whole[:100])
    with pytest.raises(UserError, match="is damaged"):
        Corpus(corpus)
    path.write_text('{"a": 1}')
    with pytest.raises(UserError, match="does not describe a corpus"):
        Corpus(corpus)
    path.write_text(whole.replace('"version": 1', '"version": 99', 1))
    with pytest.raises(UserError, match="format version 99"):
        Corpus(corpus)
    path.unlink()
    (corpus / ".building").mkdir()
    with pytest.raises(UserError, match="is not finished; run the same"):
        Corpus(corpus)


def test_fingerprint_names_the_content(corpus: Path, tmp_path: Path, sample_text: str) -> None:
    """Equal text, vocabulary and options have equal fingerprints; another token changes it."""
    base = manifest(corpus)
    assert base["fingerprint"] == fingerprint(base)
    (tmp_path / "text.txt").write_text(sample_text.replace("清晨", "早晨"))
    shard((str(tmp_path / "text.txt"),), output=tmp_path / "other", vocab=corpus / "vocab.txt")
    assert Corpus(tmp_path / "other").fingerprint != base["fingerprint"]


def test_large_vocabulary_is_stored_in_32_bits(tmp_path: Path) -> None:
    tokens = [*LEADING_TOKENS, *(f"zz{i}" for i in range(40_000)), *"中国"]
    (tmp_path / "vocab.txt").write_text("".join(f"{t}\n" for t in tokens))
    (tmp_path / "text.txt").write_text("中国zz39999\n")
    shard((str(tmp_path / "text.txt"),), output=tmp_path / "c", vocab=tmp_path / "vocab.txt")
    opened = Corpus(tmp_path / "c")
    tokens_on_disk = opened.shards[0].tokens
    assert tokens_on_disk.dtype == np.dtype("<u4")
    expected = [tokens.index("中"), 1 << 31 | tokens.index("国"), tokens.index("zz39999")]
    assert tokens_on_disk.tolist() == expected


def damage(corpus: Path, rng: random.Random, kind: str) -> str:
    """Flip a bit of a file, cut one off, or swap two files of the corpus; returns what was done."""
    shards = sorted(corpus.glob("shard-*.bin"))
    path = rng.choice([*shards, corpus / "vocab.txt"] if kind != "swap" else shards)
    data = bytearray(path.read_bytes())
    if kind == "flip":
        place = rng.randrange(8 * len(data))
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        return f"bit {place} of {path.name}"
    if kind == "truncate":
        path.write_bytes(data[: rng.randrange(len(data))])
        return f"{path.name} cut off"
    other = rng.choice([shard for shard in shards if shard != path])
    path.write_bytes(other.read_bytes())
    other.write_bytes(data)
    return f"{path.name} and {other.name} swapped"


def test_verify_finds_each_of_500_damages(corpus: Path) -> None:
    """Each bit flip, truncation or swap of shards is a UserError, on opening or from verify."""
    rng = random.Random(0)
    whole = {path: path.read_bytes() for path in corpus.iterdir()}
    missed = []
    for kind in rng.choices(["flip", "truncate", "swap"], [3, 1, 1], k=500):
        what = damage(corpus, rng, kind)
        try:
            Corpus(corpus).verify()
            missed.append(what)
        except UserError:
            pass
        for path, data in whole.items():
            if path.read_bytes() != data:
                path.write_bytes(data)
    assert missed == []
    Corpus(corpus).verify()


def test_verify_finds_every_flip_that_changes_what_the_manifest_says(corpus: Path) -> None:
    """Only a flip that turns white space into other white space may go unnoticed."""
    path = corpus / "corpus.json"
    text, base = path.read_bytes(), manifest(corpus)
    rng = random.Random(0)
    for place in rng.sample(range(8 * len(text)), 300):
        data = bytearray(text)
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        try:
            is_same = json.loads(data) == base
        except ValueError:
            is_same = False
        if not is_same:
            with pytest.raises(UserError):
                Corpus(corpus).verify()
    path.write_bytes(text)
