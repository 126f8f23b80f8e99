"""Damaged and odd inputs: success, or one UserError that names the file, and accounts that add up.

CLUE_DS_FUZZ is the number of inputs for each test (default 100).
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from clue_ds.data.build.command import shard
from clue_ds.data.build.report import summarise
from clue_ds.data.text.choices import OnError
from clue_ds.data.text.vocab import read_vocab
from clue_ds.errors import UserError

FUZZ = settings(
    max_examples=int(os.environ.get("CLUE_DS_FUZZ", "100")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)
PIECES = (
    *(
        "好",
        "一句话。",
        "abc",
        " ",
        "\t",
        ",",
        ";",
        '"',
        '""',
        "\n",
        "\n\n",
        "\r\n",
        "\ufeff",
        "\x00",
    ),
    *(
        "text",
        "id,text\n",
        "label\ttext\n",
        '1,"好,\n好"\n',
        '0\t"好"\n',
        '{"text": "好"}\n',
        "null",
    ),
    *(
        '{"text": null}\n',
        '{"text": "\\ud800"}\n',
        '{"text": "一\\n\\n二"}',
        '{"body": 1}\n',
        "\x0b",
    ),
    *('{"text": ' + "[" * 5000, "[", "]", "{", "}", ":", "\\", "<html>", "&amp;", "\u3000", "\x1c"),
    *("[" + '{"text": "好"}', '{"text": ' + "1" * 5000 + "}\n", "[1]\n", "%PDF-", "\u2028", "\x85"),
)
BYTES = (b"\xff", b"\xe5\xa5", b"\x80", "坏".encode("gb18030"), b"\n\xff", b"\xff\n")
CONTENT = st.lists(st.sampled_from([*(p.encode() for p in PIECES), *BYTES]), max_size=12)
NAMES = ("a.txt", "a", "a.jsonl", "a.JSON", "a.csv", "a.TSV", "a[1].txt", "a.parquet", "a.txt.gz")


def zipped(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("one.txt", "two.csv", "__MACOSX/._one.txt"):
            archive.writestr(zipfile.ZipInfo(name), data)
    return file.getvalue()


def tarred(data: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in ("one.txt", "two.jsonl"):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return file.getvalue()


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "zstd": zstandard.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    "zip": zipped,
    "tar": tarred,
    "tar.gz": lambda data: gzip.compress(tarred(data)),
}


@st.composite
def mutated(draw: st.DrawFn, data: bytes) -> bytes:
    """`data` with up to three damages: bytes changed, cut out, put in, or cut off."""
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["flip", "remove", "insert", "cut", "repeat"]))
        if kind == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ draw(st.integers(1, 255))]) + data[at + 1 :]
        elif kind == "remove":
            data = data[:at] + data[at + draw(st.integers(1, 20)) :]
        elif kind == "insert":
            data = data[:at] + draw(st.binary(max_size=8)) + data[at:]
        elif kind == "cut":
            data = data[:at]
        elif kind == "repeat":
            data = data + data[:at]
    return data


@pytest.fixture(scope="module")
def vocab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"好一句话。abc"]))
    assert read_vocab(path)
    return path


def convert(data: bytes, name: str, vocab: Path, on_error: OnError) -> dict[str, int] | None:
    """The counts of the corpus that `shard` makes; None where it refuses, rightly and cleanly."""
    with tempfile.TemporaryDirectory() as directory:
        path, output = Path(directory) / name, Path(directory) / "corpus"
        path.write_bytes(data)
        try:
            shard(
                (str(path),), output=output, vocab=vocab, words="none", on_error=on_error, workers=1
            )
        except UserError as error:
            message = str(error)
            assert name in message or "there is no text in the input" in message, message
            assert "\n" not in message, message
            left = {entry.name for entry in output.iterdir()} if output.exists() else set()
            assert left <= {".building"}, left
            return None
        manifest = json.loads((output / "corpus.json").read_text(encoding="utf-8"))
        summarise(manifest)  # asserts that what was read was accepted or dropped for one reason
        counts: dict[str, int] = manifest["counts"]
        return counts


@FUZZ
@given(data=st.data(), content=CONTENT, name=st.sampled_from(NAMES), skip=st.booleans())
def test_any_text_is_read_or_refused(
    vocab: Path, data: st.DataObject, content: list[bytes], name: str, skip: bool
) -> None:
    text = data.draw(mutated(b"".join(content)))
    convert(text, name, vocab, "skip" if skip else "refuse")


@FUZZ
@given(
    data=st.data(),
    content=CONTENT,
    name=st.sampled_from(NAMES),
    packer=st.sampled_from(list(PACKERS)),
    skip=st.booleans(),
)
def test_any_packed_input_is_read_or_refused(
    vocab: Path, data: st.DataObject, content: list[bytes], name: str, packer: str, skip: bool
) -> None:
    packed = data.draw(mutated(PACKERS[packer](b"".join(content))))
    convert(packed, name, vocab, "skip" if skip else "refuse")


LINES = ("好\n", "\n", " \t\n", "\r\n", "\x01\n", "一\u2028二\n", "\ufeff\n", "好", "&#10;\n")


@FUZZ
@given(lines=st.lists(st.sampled_from([*map(str.encode, LINES), b"\xff\n", b"\xff", b"\xe5\xa5"])))
@example([b"\xe5\xa5\xbd\n", b"\n", b"\xff"])  # the line end before a bad last line was lost
def test_every_line_is_counted_once(vocab: Path, lines: list[bytes]) -> None:
    """Lines read = lines in the file; 66 of 20,000 fuzzed inputs were one short."""
    text = "一句话。\n".encode() + b"".join(lines)
    counts = convert(text, "a.txt", vocab, "skip")
    assert counts is not None
    assert counts["lines"] == text.count(b"\n") + (not text.endswith(b"\n"))


RECORDS = (
    *(
        '{"text": "好"}',
        '{"text": ""}',
        '{"text": null}',
        "{",
        "[]",
        '"好"',
        "1" * 5000,
        "\ufeff{}",
    ),
    *(
        '{"text": ' + "[" * 100_000,
        '{"text": "\\ud800"}',
        '{"text": "一\\n\\n \\n二"}',
        "nul",
        "\x00",
    ),
)


@FUZZ
@given(
    records=st.lists(st.sampled_from([*map(str.encode, RECORDS), b"\xff", b"", b" \t", b"\r"])),
    end=st.sampled_from([b"", b"\n", b"\r\n", b"\n\n"]),
)
def test_every_record_is_counted_once(vocab: Path, records: list[bytes], end: bytes) -> None:
    lines = ['{"text": "一句话。"}'.encode(), *records]
    counts = convert(b"\n".join(lines) + end, "a.jsonl", vocab, "skip")
    assert counts is not None
    assert counts["records"] == sum(bool(line.strip()) for line in lines)


@FUZZ
@given(
    rows=st.lists(
        st.sampled_from(
            ['1,"好\n好"', "2,", "3,好,好", "4", '5,"', '6,"好"好', "7,好\x00", "8,\ufeff"]
        ),
        max_size=8,
    ),
    bad=st.booleans(),
)
def test_rows_of_csv_are_read_or_counted(vocab: Path, rows: list[str], bad: bool) -> None:
    text = "\n".join(["id,text", "0,一句话。", *rows]).encode() + b"\n9,\xff\n" * bad
    counts = convert(text, "a.csv", vocab, "skip")
    assert counts is not None
    rejected = [name for name in counts if name.startswith("records_") and "accepted" not in name]
    assert counts["records"] == counts["records_accepted"] + sum(counts[n] for n in rejected)
