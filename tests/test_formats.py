"""What a file is follows from its content: every kind that is read, and every kind that is not."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import random
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from clue_ds.data.text import inputs
from clue_ds.data.text.decode import Tally, text_blocks
from clue_ds.data.text.formats.json_records import ArrayLines, read_records
from clue_ds.data.text.formats.kinds import REFUSED, recognise
from clue_ds.data.text.formats.streams import Damaged, HeadStream, unpacked
from clue_ds.data.text.formats.tables import BadRecord
from clue_ds.data.text.inputs import read_segments
from clue_ds.data.text.sources import declared_format, resolve
from clue_ds.errors import UserError
from clue_ds.files import size_text

TEXT = "第一句。\n第二句。\n\n三\n"
LINES = ["第一句。", "第二句。", "三"]
RECORDS = [{"id": 1, "text": "第一句。\n第二句。"}, {"id": 2, "text": "三"}]


def read(path: Path, format: str = "auto", field: str = "text", skip: bool = False) -> list[str]:
    """The lines that are not blank; with `skip`, bad ones are dropped."""
    tally = Tally()
    blocks = [
        block
        for source in resolve((str(path),), format)  # type: ignore[arg-type]
        for segment in read_segments(source, 1 << 20, 1 << 21, field)
        for block in text_blocks(segment, field, "skip" if skip else "refuse", tally)
    ]
    return [line for line in "".join(blocks).replace("\r", "").split("\n") if line]


def dumped(records: object, indent: int | None = None) -> bytes:
    return json.dumps(records, ensure_ascii=False, indent=indent).encode()


def json_lines(records: list[dict[str, object]]) -> bytes:
    return b"".join(dumped(record) + b"\n" for record in records)


CSV = '\ufeffid,"text"\r\n1,"第一句。\n第二句。"\r\n\r\n2,三\r\n'.encode()
TSV = "text\tlabel\n第一句。\t1\n第二句。\t0\n三\t1\n".encode()
READ: dict[str, bytes] = {
    "JSON lines": json_lines(RECORDS),
    "JSON lines with a byte order mark": b"\xef\xbb\xbf\n" + json_lines(RECORDS),
    "JSON lines with CRLF": json_lines(RECORDS).replace(b"}\n", b"} \r\n\r\n"),
    "array": dumped(RECORDS),
    "array, indented": b"\xef\xbb\xbf" + dumped(RECORDS, indent=2) + b"\n",
    "two arrays": dumped(RECORDS[:1]) + b"\n" + dumped(RECORDS[1:]),
    "csv": CSV,
    "csv with semicolons": 'id;text\n1;"第一句。\n第二句。"\n2;三\n'.encode(),
    "tsv": TSV,
    "text": TEXT.encode(),
}


@pytest.mark.parametrize("name", ["a", "a.txt", "A.LOG", "a.dump.1"])
@pytest.mark.parametrize("kind", READ)
def test_kinds_of_text_under_any_name(tmp_path: Path, kind: str, name: str) -> None:
    (tmp_path / name).write_bytes(READ[kind])
    assert read(tmp_path / name) == LINES


@pytest.mark.parametrize("name", ["a.JSONL", "a.json", "a.Json.GZ"])
def test_names_of_any_case(tmp_path: Path, name: str) -> None:
    assert declared_format(name) == "jsonl"
    for kind in ("JSON lines", "array", "array, indented"):
        (tmp_path / name).write_bytes(READ[kind])
        assert read(tmp_path / name) == LINES


def packed_twice(data: bytes, compress: Callable[[bytes], bytes]) -> bytes:
    half = len(data) // 2
    return compress(data[:half]) + compress(data[half:])


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "zstd": zstandard.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "xz with padding": lambda data: lzma.compress(data) + bytes(8),
    "pzstd": lambda data: b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd" + zstandard.compress(data),
}


@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize("kind", ["text", "array", "csv"])
def test_compression_under_any_name(tmp_path: Path, compressor: str, kind: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(packed_twice(READ[kind], COMPRESSORS[compressor]))
    assert read(path) == LINES
    cut = path.read_bytes()[: -13 if "padding" in compressor else -5]
    path.write_bytes(cut)
    for skip in (False, True):
        with pytest.raises(UserError, match=r"a\.txt is not a complete compressed file"):
            read(path, skip=skip)


@pytest.mark.parametrize("compressor", ["bzip2", "xz", "zstd", "gzip"])
def test_damage_at_the_header_of_a_later_stream_is_no_end(compressor: str) -> None:
    """The classes of bz2 and lzma take it for rubbish at the end of the file, and lose the rest."""
    compress = COMPRESSORS[compressor]
    data = compress(TEXT.encode()) + b"\x99" + compress(TEXT.encode())[1:]
    with pytest.raises(Damaged):
        stream, _ = unpacked(HeadStream(io.BytesIO(data)))
        while stream.read(1 << 16):
            pass


@pytest.mark.parametrize("compressor", ["bzip2", "xz", "gzip"])
def test_what_unpacks_to_much_is_read_in_pieces(compressor: str) -> None:
    stream, _ = unpacked(HeadStream(io.BytesIO(COMPRESSORS[compressor](bytes(b"a" * (1 << 25))))))
    sizes = []
    while block := stream.read(1 << 16):
        sizes.append(len(block))
    assert sum(sizes) == 1 << 25 and max(sizes) <= 1 << 16


def zip_of(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def tar_of(members: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as archive:
        directory = tarfile.TarInfo("folder")
        directory.type = tarfile.DIRTYPE
        archive.addfile(directory)
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return file.getvalue()


GNU = tarfile.GNU_FORMAT
MEMBERS = {
    "folder/b.txt": b"one\n",
    "__MACOSX/folder/._b.txt": b"\x00\x05\x16\x07" * 100,
    "a.jsonl.gz": gzip.compress(dumped({"text": "two"})),
    "空.txt": b"",
    "c.csv": b"id,text\n1,three\n",
    "d.json": dumped([{"text": "four"}]),
}
ARCHIVES: dict[str, bytes] = {
    "zip": zip_of(MEMBERS),
    "stored zip": zip_of(MEMBERS, zipfile.ZIP_STORED),
    "lzma zip": zip_of(MEMBERS, zipfile.ZIP_LZMA),
    "tar": tar_of(MEMBERS),
    "gnu tar": tar_of({f"{'x' * 200}/{name}": data for name, data in MEMBERS.items()}, GNU),
    "tar.xz": lzma.compress(tar_of(MEMBERS)),
    "zip.gz": gzip.compress(zip_of(MEMBERS)),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_members_of_archives_in_order_each_by_its_own_kind(tmp_path: Path, kind: str) -> None:
    (tmp_path / "corpus.txt").write_bytes(ARCHIVES[kind])
    assert read(tmp_path / "corpus.txt") == ["one", "two", "three", "four"]


def test_a_bad_line_of_a_member_is_named_with_it(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(zip_of({"b/c.txt": b"good\n\xff\n"}))
    with pytest.raises(UserError, match=r"a\.zip \(b/c\.txt\): byte 5 is not UTF-8"):
        read(tmp_path / "a.zip")
    assert read(tmp_path / "a.zip", skip=True) == ["good"]


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_damaged_archives_are_never_shorter_ones(tmp_path: Path, kind: str) -> None:
    """Cut off or with one byte changed: all texts or an error, also where a header is damaged."""
    members = {f"{i}.txt": f"text {i}\n".encode() * 40 for i in range(4)}
    data = zip_of(members) if kind == "zip" else tar_of(members)
    expected = [f"text {i}" for i in range(4) for _ in range(40)]
    path = tmp_path / "a"
    rng = random.Random(3)
    read_whole = 0
    for _ in range(150):
        at = rng.randrange(len(data))
        damaged = data[:at] if rng.random() < 0.3 else bytearray(data)
        if isinstance(damaged, bytearray):
            damaged[at] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            lines = read(path)
        except UserError as error:
            assert str(path) in str(error)
            continue
        read_whole += 1
        # A tar has no checksum of what is in its members, so one of their 160 lines may differ.
        assert lines == expected or (kind == "tar" and len(lines) >= len(expected) - 1)
    assert read_whole


DOCX = {"[Content_Types].xml": b"<Types/>", "word/document.xml": b"<w/>"}
PAGES: dict[str, list[bytes]] = {
    "7z": [b"7z\xbc\xaf\x27\x1c\x00\x04"],
    "rar": [b"Rar!\x1a\x07\x01\x00"],
    "pdf": [b"%PDF-1.7\n"],
    "html": [b"<!DOCTYPE html>\n<html>", b"\n <HTML lang='zh'>", b"<!-- x -->\n<head>"],
    "xml": [b"<?xml version='1.0'?>\n<Error>", b"<mediawiki xmlns='x'>"],
    "office": [zip_of(DOCX), zip_of({"mimetype": b"application/vnd.oasis.opendocument.text"})],
    "epub": [zip_of({"mimetype": b"application/epub+zip", "a.html": b"<html>"})],
    "torch": [zip_of({"archive/data.pkl": b"\x80\x02}", "archive/version": b"3"})],
    "old office": [b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600)],
    "rtf": [b"{\\rtf1\\ansi"],
    "lfs pointer": [b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"],
    "utf-16": ["好的\n".encode("utf-16"), b"\xfe\xff" + "好".encode("utf-16-be")],
    "utf-32": ["好的\n".encode("utf-32")],
    "zeros": [bytes(5000)],
    "object": [dumped({"data": RECORDS}, indent=2)],
    "pickle": [b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00}"],
    "binary": [random.Random(0).randbytes(3000), zip_of(MEMBERS)[5:]],
    "lz4": [b"\x04\x22\x4d\x18\x64\x40"],
    "sqlite": [b"SQLite format 3\x00\x10"],
}


@pytest.mark.parametrize("kind", PAGES)
def test_what_is_not_read_is_named_with_advice(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.txt"
    for content in PAGES[kind]:
        for data, shown in (
            (content, str(path)),
            (gzip.compress(content), str(path)),
            (tar_of({"x": content}), f"{path} (x)"),
        ):
            is_zip = kind in ("office", "epub", "torch")
            if is_zip and data[:2] not in (b"PK", b"\x1f\x8b"):
                continue  # an archive inside an archive
            path.write_bytes(data)
            for skip in (False, True):
                with pytest.raises(UserError) as error:
                    read(path, skip=skip)
                assert str(error.value) == f"input {shown} {REFUSED[kind]}"


def test_an_archive_inside_an_archive_and_a_locked_one(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(zip_of({"b.tar": tar_of(MEMBERS)}))
    with pytest.raises(UserError, match=r"a\.zip \(b\.tar\) is an archive inside an archive"):
        read(tmp_path / "a.zip")
    locked = bytearray(zip_of({"b.txt": b"secret"}))
    for signature, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        locked[locked.find(signature) + place] |= 1
    (tmp_path / "a.zip").write_bytes(locked)
    with pytest.raises(UserError, match=r"is an encrypted zip archive \(b\.txt\)"):
        read(tmp_path / "a.zip")


def test_a_given_format_wins_over_what_a_text_looks_like(tmp_path: Path) -> None:
    for kind in ("html", "xml", "object"):
        (tmp_path / "a.csv").write_bytes(PAGES[kind][0])
        assert read(tmp_path / "a.csv", "text")
    (tmp_path / "a.csv").write_bytes(CSV)
    assert len(read(tmp_path / "a.csv", "text")) == 4
    (tmp_path / "a.txt").write_bytes(CSV.replace(b"text", b"body"))
    with pytest.raises(UserError, match="no column 'text'; its columns: id, body; .*--format text"):
        read(tmp_path / "a.txt")
    assert read(tmp_path / "a.txt", field="body") == LINES


def test_texts_that_look_like_nothing_else() -> None:
    """Chinese, English and GB18030 prose, notes in brackets, and control characters are texts."""
    for text in (
        "[1] 参考文献\n[2] 另一篇\n",
        "Yes, sir\nNo, madam\nOh, well\n",
        "{花括号}\n",
        "a\x00\n",
    ):
        assert recognise(text.encode()) is None
        stream = HeadStream(io.BytesIO(text.encode()))
        assert (stream.head, stream.is_whole) == (text.encode(), True)
    assert recognise(("坏的文字。" * 500).encode("gb18030")) is None


BAD_CSV = (
    ("1,好,多\n", "line 3 has 3 fields, but the line of column names has 2", "records_not_csv"),
    ('1,"好"坏\n', "line 3 and after is not a row of csv", "records_not_csv"),
    ('1,"没有结束\n', "line 3 and after is not a row of csv", "records_not_csv"),
)


@pytest.mark.parametrize(("row", "message", "reason"), BAD_CSV)
def test_bad_rows_of_csv(tmp_path: Path, row: str, message: str, reason: str) -> None:
    (tmp_path / "a.csv").write_text(f"id,text\n0,零\n{row}")
    with pytest.raises(UserError, match=rf"a\.csv: {message}"):
        read(tmp_path / "a.csv")
    assert read(tmp_path / "a.csv", skip=True) == ["零"]


def test_csv_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"id,text\n0,x\n1," + "坏".encode("gb18030") + b"\n2,y\n")
    with pytest.raises(UserError, match=r"a\.csv: line 3 is not UTF-8"):
        read(tmp_path / "a.csv")
    assert read(tmp_path / "a.csv", skip=True) == ["x", "y"]


def test_quotes_in_tsv_are_text(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('text\tlabel\n"他说\t1\n"一""二"\t0\n三"\t1\n')
    assert read(tmp_path / "a.tsv") == ['"他说', '一"二', '三"']


@settings(max_examples=100, deadline=None)
@given(
    records=st.lists(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(st.sampled_from('a"\\[]{},\n好\r')),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.text(st.sampled_from('k"]')), inner, max_size=3)
            ),
            max_leaves=8,
        ),
        max_size=5,
    ),
    indent=st.sampled_from([None, 0, 2]),
    num_bytes=st.integers(1, 40),
)
def test_an_array_becomes_lines_of_the_same_length(
    records: list[object], indent: int | None, num_bytes: int
) -> None:
    data = dumped(records, indent)
    stream = ArrayLines(io.BytesIO(data), "a")
    lines = b"".join(iter(lambda: stream.read(num_bytes), b""))
    assert len(lines) == len(data)
    assert [json.loads(line) for line in lines.split(b"\n") if line.strip()] == records


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'[{"text": "a"}, {"te', "ends after byte 20 inside of its JSON array"),
        (b'[{"text": "a"}]x', "byte 15 is neither inside of the JSON array"),
    ],
)
def test_an_array_that_is_not_complete(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(data)
    for skip in (False, True):
        with pytest.raises(UserError, match=rf"a\.json:? {message}"):
            read(tmp_path / "a.json", skip=skip)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_records_that_are_too_long_or_too_deep_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(inputs, "MAX_RECORD_BYTES", 3000)
    long, deep = dumped({"text": "x" * 3000}), b'{"text": ' + b"[" * 2990
    good = [dumped({"text": f"good {i}"}) for i in range(3)]
    if kind == "jsonl":
        data = b"\n".join([good[0], deep, good[1], long, good[2], long])
    elif kind == "json":
        data = b"[" + b",\n".join([good[0], long, good[1], long, good[2]]) + b"]"
    else:
        data = b"id,text\n0,good 0\n1," + b"x" * 4000 + b"\n2,good 1\n3,good 2\n"
    path = tmp_path / f"a.{kind}"
    path.write_bytes(data)
    expected = ["good 0", "good 1", "good 2"]
    for read_bytes in (1 << 20, 700, 64):
        monkeypatch.setattr(inputs, "READ_BYTES", read_bytes)
        tally = Tally()
        segments = [
            segment
            for source in resolve((str(path),))
            for segment in read_segments(source, 10, 1000, "text")
        ]
        blocks = [b for s in segments for b in text_blocks(s, "text", "skip", tally)]
        assert [line for line in "".join(blocks).split("\n") if line] == expected
        counts = tally.counts
        rejected = {k: n for k, n in counts.items() if k.startswith("records_")}
        assert counts["records"] == sum(rejected.values()), rejected
        assert sum(rejected.values()) - counts["records_accepted"] == {"csv": 1}.get(
            kind, 3 - (kind == "json")
        )
    bad = [s for s in segments if any(isinstance(row, BadRecord) for row in s.data)]
    first = bad[0]
    with pytest.raises(UserError, match=rf"a\.{kind}: .* (?:a record of|is too long)"):
        list(text_blocks(first, "text", "refuse", Tally()))


def run(command: str, directory: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command of bash in which `$SHARD` is the verb."""
    environment = {**os.environ, "SHARD": f"{sys.executable} -m clue_ds.cli shard", **variables}
    return subprocess.run(
        ["bash", "-c", command],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_pipes_are_read_and_compared_by_their_content(tmp_path: Path) -> None:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(TEXT) - {"\n"})]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens) + "\n")
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "a.zip").write_bytes(zip_of({"a.txt": TEXT.encode()}))
    options = "--vocab vocab.txt --workers 1 --words none --output"
    first = run(f"$SHARD <(cat a.txt) {options} c", tmp_path)
    assert first.returncode == 0 and "in 3 sentences and 2 documents" in first.stdout, first.stderr
    for command, status, message in (
        (f"cat a.txt | $SHARD /dev/stdin {options} c", 0, "same text; nothing to do"),
        (f"$SHARD <(cat a.txt a.txt) {options} c", 2, "(the text of the inputs)"),
        (f"$SHARD <(cat a.zip) {options} zip", 0, "in 3 sentences and 2 documents"),
        (f"$SHARD <(true) {options} none", 2, "is empty; leave it out"),
        (f"cat a.txt | $SHARD - - {options} twice", 2, "given more than once"),
    ):
        result = run(command, tmp_path)
        assert result.returncode == status, result.stderr
        assert message in result.stdout + result.stderr


def test_small_files_of_records(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1} \r\n\r\n[2]\n \n')
    assert list(read_records(path)) == [(1, {"a": 1}), (3, [2])]
    for data, message in (
        (b'{"a": 1}\n{"a"', "line 2 is not JSON"),
        (b'{"a": 1}\n{"a": "\xff"}', "line 2 is not UTF-8 at its byte 7"),
        (b'{"a": ' + b"[" * 100_000 + b"\n{}", "line 1 is not JSON: it is nested too deeply"),
        (dumped([{"a": 1}], indent=1), "is a JSON array"),
        (gzip.compress(b"{}"), "is a gzip file"),
        (PAGES["lfs pointer"][0], "is a Git LFS pointer"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=message):
            list(read_records(path))


def test_sizes_have_a_unit_that_fits() -> None:
    sizes = [0, 999, 1000, 4608, 1 << 20, 1023 << 20, 5 << 30, 3 << 40]
    assert [size_text(n) for n in sizes] == [
        *("0 bytes", "999 bytes", "1.0 KiB", "4.5 KiB", "1.0 MiB", "1.0 GiB", "5.0 GiB"),
        "3,072.0 GiB",
    ]
