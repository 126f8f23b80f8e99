"""Damage in a corpus is found before a batch is made of it, at any place and in any kind of file.

CLUE_DS_FUZZ is the number of flipped bits that are tried; each is drawn in one of the regions.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from clue_ds import files
from clue_ds.data import Corpus, Loader, SampleStream, checksums, verification
from clue_ds.data.build.command import shard
from clue_ds.data.corpus import (
    CHECKSUMS,
    MANIFEST,
    VOCAB_FILE,
    ShardArrays,
    fingerprint,
    manifest_checksum,
    map_shard,
    write_shard,
)
from clue_ds.data.stream import sample_index
from clue_ds.data.stream.samples import KINDS
from clue_ds.data.text.vocab import learn
from clue_ds.errors import UserError

NUM_FLIPS = int(os.environ.get("CLUE_DS_FUZZ", "120"))
REGIONS = ("header", "tokens", "sentence ends", "document ends", MANIFEST, VOCAB_FILE)
DERIVED = (CHECKSUMS, "sample index")
ARCHIVE = Path(__file__).parent / "data" / "before_rooms.tar.xz"

START = """
import sys
from clue_ds.data import Corpus, SampleStream, verification
verification.AT_OPEN_BYTES = 0
print(SampleStream(Corpus(sys.argv[1]), 32, 8, 0).arrays(5)["input_ids"].sum())
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> Path:
    """A corpus of several shards, each of several pieces."""
    directory: Path = tmp_path_factory.mktemp("damage")
    lines = sample_text.splitlines()
    text = "\n".join(f"{line}{i}" if line else "" for i in range(400) for line in lines)
    (directory / "text.txt").write_text(text)
    source = (str(directory / "text.txt"),)
    learn(source, output=directory / "vocab.txt", size=400, min_frequency=1)
    options = {"workers": 1, "shard_megabytes": 0.13, "words": "none"}
    shard(source, output=directory / "corpus", vocab=directory / "vocab.txt", **options)  # type: ignore[arg-type]
    assert min(path.stat().st_size for path in shards(directory / "corpus")) > checksums.PIECE_BYTES
    return directory / "corpus"


@pytest.fixture
def corpus(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that may be damaged; a cache of its own stands in for the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return shutil.copytree(made, tmp_path / "corpus")


@pytest.fixture
def at_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat a small corpus as a large one: nothing is compared before it is used."""
    monkeypatch.setattr(verification, "AT_OPEN_BYTES", 0)
    monkeypatch.setattr(sample_index, "KEPT_FROM", 1)


def shards(corpus: Path) -> list[Path]:
    return sorted(corpus.glob("shard-*.bin"))


def stream(corpus: Path, kind: str = "windows", order: str = "shuffle") -> SampleStream:
    return SampleStream(Corpus(corpus), 64, 64, 0, samples=kind, order=order)  # type: ignore[arg-type]


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(array, other[name]) for name, array in one.items())


def flip(path: Path, place: int) -> None:
    """Flip a bit, and leave size and time as they were."""
    status = path.stat()
    with open(path, "r+b") as file:
        file.seek(place // 8)
        byte = file.read(1)[0]
        file.seek(place // 8)
        file.write(bytes([byte ^ 1 << place % 8]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def draw(corpus: Path, region: str, rng: random.Random) -> tuple[Path, int]:
    """A file of the corpus, and a bit in one of its regions."""
    if region in (MANIFEST, VOCAB_FILE, CHECKSUMS):
        path = corpus / region
        return path, rng.randrange(8 * path.stat().st_size)
    if region == "sample index":
        path = rng.choice(sorted(corpus.with_name("corpus.index").glob("*-*.bin")))
        return path, rng.randrange(8 * path.stat().st_size)
    path = rng.choice(shards(corpus))
    tokens, sentences, documents = map_shard(path).arrays
    size = path.stat().st_size
    # A section's region includes the padding behind it.
    begins = [0, 64, -(-(64 + tokens.nbytes) // 64) * 64, size - documents.nbytes, size]
    begin, end = begins[REGIONS.index(region) :][:2]
    return path, rng.randrange(8 * begin, 8 * end)


def outcome(corpus: Path, kind: str, order: str, whole: list[dict[str, np.ndarray]]) -> str:
    """The error that ends an epoch; batches before it must be those of the whole corpus."""
    try:
        opened = stream(corpus, kind, order)
        if order == "lanes":
            with Loader(opened) as loader:
                for expected in whole:
                    assert same({k: v.numpy() for k, v in next(loader).items()}, expected)
        else:
            for step, expected in enumerate(whole):
                assert same(opened.arrays(step), expected)
    except UserError as error:
        return str(error)
    return ""


def missed_flips(corpus: Path, num: int, seed: int) -> list[str]:
    """Flip `num` bits one by one; those that were not found."""
    rng = random.Random(seed)
    assert KINDS[0] == "windows"
    ways = [(kind, order) for kind in KINDS for order in ("shuffle", "lanes")]
    whole: dict[tuple[str, str], list[dict[str, np.ndarray]]] = {}
    for way in ways:
        opened = stream(corpus, *way)
        whole[way] = [opened.arrays(step) for step in range(opened.steps_per_epoch + 1)]
    missed = []
    for i in range(num):
        region = REGIONS[i % len(REGIONS)]
        path, place = draw(corpus, region, rng)
        # Windows don't read the tables, so damage there does no harm to their batches.
        way = rng.choice(ways[2:] if region in ("sentence ends", "document ends") else ways)
        flip(path, place)
        found = outcome(corpus, *way, whole[way])
        flip(path, place)
        if path.name not in found:
            missed.append(f"bit {place} of {path.name} with {way}: {found or 'not found'}")
    return missed


def test_each_flipped_bit_is_found_when_a_small_corpus_is_opened(corpus: Path) -> None:
    assert missed_flips(corpus, NUM_FLIPS // 4, 0) == []


def test_each_flipped_bit_is_found_before_a_large_corpus_uses_it(
    corpus: Path, at_first_use: None
) -> None:
    """Batches that were handed out before the error are those of the whole corpus."""
    assert missed_flips(corpus, NUM_FLIPS // 4, 1) == []


@pytest.mark.parametrize("is_large", [False, True])
def test_each_flipped_bit_is_found_in_a_corpus_of_an_earlier_version(
    corpus: Path, is_large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large one is compared with its SHA-256 once; the flips come after that."""
    (corpus / CHECKSUMS).unlink()
    if is_large:
        monkeypatch.setattr(verification, "AT_OPEN_BYTES", 0)
    assert missed_flips(corpus, NUM_FLIPS // 8, 2) == []


def test_each_flipped_bit_in_a_derived_file_is_found_and_does_no_harm(
    corpus: Path, at_first_use: None, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = stream(corpus, "sentences")
    expected = [opened.arrays(step) for step in range(opened.steps_per_epoch)]
    rng = random.Random(3)
    for i in range(NUM_FLIPS // 4):
        path, place = draw(corpus, DERIVED[i % 2], rng)
        flip(path, place)
        capsys.readouterr()
        assert outcome(corpus, "sentences", "shuffle", expected) == ""
        assert str(path) in capsys.readouterr().err, (path, place)
        if path.name == CHECKSUMS:  # an index was made again
            flip(path, place)


def test_sums_are_those_that_the_format_describes(corpus: Path) -> None:
    """The example of docs/shard-format.md, run unchanged, agrees with checksums.bin."""
    page = (Path(__file__).resolve().parents[1] / "docs" / "shard-format.md").read_text("utf-8")
    (code,) = (part for part in page.split("```") if "def checksum(" in part)
    names: dict[str, object] = {}
    exec(code.removeprefix("python\n"), names)
    found = [
        names["checksum"](path.read_bytes()[at : at + checksums.PIECE_BYTES])  # type: ignore[operator]
        for path in shards(corpus)
        for at in range(0, path.stat().st_size, checksums.PIECE_BYTES)
    ]
    assert (corpus / CHECKSUMS).read_bytes()[48:] == np.array(found, "<u8").tobytes()


@pytest.mark.parametrize("order", ["shuffle", "lanes"])
def test_a_shard_that_is_cut_off_in_mid_run_is_a_message(
    corpus: Path, at_first_use: None, order: str
) -> None:
    opened = stream(corpus, "documents", order)
    victim = shards(corpus)[1]
    os.truncate(victim, 100)
    found = ""
    try:
        with Loader(opened) as loader:
            for _ in range(opened.steps_per_epoch):
                next(loader)
    except UserError as error:
        found = str(error)
    assert f"{victim} ends at byte 100; it was cut off while in use" in found


def test_a_large_corpus_of_an_earlier_version_is_read_once(
    corpus: Path, at_first_use: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (corpus / CHECKSUMS).rename(corpus.with_name("own"))
    before = sorted(corpus.iterdir())
    first = stream(corpus).arrays(0)
    assert "comparing the 0.0 GB" in capsys.readouterr().err
    kept = corpus.with_name("corpus.index") / CHECKSUMS
    assert kept.read_bytes() == corpus.with_name("own").read_bytes(), "the same in either place"
    assert sorted(corpus.iterdir()) == before, "the corpus is not touched"
    with monkeypatch.context() as context:
        context.setattr(verification, "verify", None)
        assert same(stream(corpus).arrays(0), first)
    assert capsys.readouterr().err == ""
    flip(kept, 1000)
    assert same(stream(corpus).arrays(0), first)
    assert f"{kept} is damaged, as its checksum shows; it is made again" in capsys.readouterr().err


def test_kept_checksums_of_another_corpus_are_stale(
    corpus: Path, at_first_use: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (corpus / CHECKSUMS).unlink()
    stream(corpus)
    shutil.rmtree(corpus)
    archive(corpus)
    capsys.readouterr()
    SampleStream(Corpus(corpus), 32, 8, 0).arrays(0)
    assert "belongs to another state of the corpus; it is made again" in capsys.readouterr().err


def archive(place: Path) -> None:
    """Put the corpus that an earlier version made at a place."""
    with tarfile.open(ARCHIVE) as opened:
        opened.extractall(place.with_name("old"), filter="data")
    (place.with_name("old") / "corpus").rename(place)


def test_where_nothing_can_be_written_beside_the_corpus(
    corpus: Path, at_first_use: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (corpus / CHECKSUMS).unlink()
    corpus.with_name("corpus.index").write_text("in the way")
    first = stream(corpus).arrays(0)
    (kept,) = (corpus.parent / "cache" / "clue_ds").glob(f"*.index/{CHECKSUMS}")
    shutil.rmtree(corpus.parent / "cache")
    (corpus.parent / "cache").write_text("in the way")
    capsys.readouterr()
    assert same(stream(corpus).arrays(0), first)
    assert "made again at each start" in capsys.readouterr().err


def test_of_processes_that_start_together_one_reads_everything(corpus: Path) -> None:
    (corpus / CHECKSUMS).unlink()
    command = [sys.executable, "-c", START, str(corpus)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(3)]  # type: ignore[call-overload]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert len({out for out, _ in outputs}) == 1 and outputs[0][0]
    assert sum("comparing the" in err for _, err in outputs) == 1, outputs


def test_damage_in_a_large_corpus_of_an_earlier_version_names_every_file(
    corpus: Path, at_first_use: None
) -> None:
    (corpus / CHECKSUMS).unlink()
    bad = shards(corpus)[::2]
    for path in bad:
        flip(path, 8 * 1000)
    with pytest.raises(UserError) as error:
        stream(corpus)
    assert all(f"{path.name} changed since it was written" in str(error.value) for path in bad)
    assert shards(corpus)[1].name not in str(error.value)


def rewrite(corpus: Path, tokens: list[int], sentences: list[int], documents: list[int]) -> None:
    """Make a corpus of one shard whose hashes agree with what is in it, as an older one has it."""
    for path in shards(corpus)[1:]:
        path.unlink()
    (corpus / CHECKSUMS).unlink()
    arrays = ShardArrays(np.array(tokens, np.uint16), np.array(sentences), np.array(documents))
    manifest = files.read_json(corpus / MANIFEST)
    manifest["shards"] = [write_shard(shards(corpus)[0], arrays)._asdict()]
    for name in ("num_tokens", "num_sentences", "num_documents"):
        manifest[name] = manifest["shards"][0][name]
    manifest["fingerprint"] = fingerprint(manifest)
    manifest["checksum"] = manifest_checksum(manifest)
    files.write_json(corpus / MANIFEST, manifest)


@pytest.mark.parametrize(
    ("tokens", "sentences", "documents", "message"),
    [
        ([7, 9, 3000, 8], [2, 4], [1, 2], "has the id 3000, and the vocabulary has"),
        ([7, 9, 9, 8], [3, 3, 4], [1, 3], "has sentence ends that don't increase up to 4"),
        ([7, 9, 9, 8], [9, 4], [1, 2], "has sentence ends that don't increase up to 4"),
        ([7, 9, 9, 8], [2, 4], [7, 2], "has document ends that don't increase up to 2"),
        ([7, 9, 9, 8], [2, 3], [1, 2], "are not 4, the last end"),
    ],
)
def test_numbers_that_no_corpus_has(
    corpus: Path, tokens: list[int], sentences: list[int], documents: list[int], message: str
) -> None:
    """Files whose hashes agree, written by a program that is wrong."""
    rewrite(corpus, tokens, sentences, documents)
    with pytest.raises(UserError, match=message):
        stream(corpus, "documents")


def test_a_manifest_without_a_checksum(corpus: Path) -> None:
    """An older corpus.json opens; one whose key "checksum" is damaged does not."""
    manifest = files.read_json(corpus / MANIFEST)
    checksum = manifest.pop("checksum")
    files.write_json(corpus / MANIFEST, manifest)
    Corpus(corpus)
    for change in (
        {"checksuM": checksum},
        {"num_tokens": manifest["num_tokens"] + 1},
        {"fingerprint": "0" * 64},
        {"vocab_size": manifest["max_token_id"]},
    ):
        files.write_json(corpus / MANIFEST, manifest | change)
        with pytest.raises(UserError, match=f"damaged: {MANIFEST} changed since it was written"):
            Corpus(corpus)


def test_verify_finds_checksums_that_are_not_those_of_the_shards(corpus: Path) -> None:
    table = corpus / CHECKSUMS
    flip(table, 8 * 60)
    with pytest.raises(UserError, match=f"{CHECKSUMS} is damaged, and the shards are not"):
        shard(output=corpus, verify=True)
    sums = np.zeros((table.stat().st_size - 48) // 8, np.uint64)
    checksums.write_checksums(corpus, Corpus(corpus).fingerprint, [sums])
    with pytest.raises(UserError, match=f"{CHECKSUMS} is damaged, and the shards are not"):
        shard(output=corpus, verify=True)
