"""Reading inputs: every kind of source, where segments are cut, and every kind of bad input."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from clue_ds.data.text import inputs as inputs_module
from clue_ds.data.text.choices import OnError
from clue_ds.data.text.decode import Tally, read_lines, text_blocks
from clue_ds.data.text.inputs import _cut, read_chunks, read_segments
from clue_ds.data.text.sources import TextSource, resolve
from clue_ds.errors import UserError

DOCUMENTS = [["第一句。", "第二句。"], ["another document"], ["三", "四", "五"]]
TEXT = "\n\n".join("\n".join(lines) for lines in DOCUMENTS) + "\n"


def documents(path: Path, **options: str) -> list[list[str]]:
    """The documents that are read from a file."""
    tally = Tally()
    result: list[list[str]] = []
    for source in resolve((str(path),)):
        for segment in read_segments(source, 1 << 20, 1 << 20, options.get("text_field", "text")):
            blocks = text_blocks(segment, options.get("text_field", "text"), "refuse", tally)
            for document in "".join(blocks).split("\n\n"):
                lines = [line for line in document.split("\n") if line]
                result += [lines] if lines else []
    return result


def zstd(data: bytes) -> bytes:
    """Two frames, as pzstd writes them."""
    half = len(data) // 2
    return b"".join(zstandard.compress(block) for block in (data[:half], data[half:]))


PACKERS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


def parquet_bytes(texts: list[str]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), sink)
    return sink.getvalue()


RECORDS = ["\n".join(lines) for lines in DOCUMENTS]
CONTENTS = {
    ".txt": TEXT.encode(),
    ".jsonl": "".join(json.dumps({"text": r}) + "\n" for r in RECORDS).encode(),
    ".parquet": parquet_bytes(RECORDS),
}


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("kind", CONTENTS)
def test_every_format_in_every_packing(tmp_path: Path, kind: str, packer: str) -> None:
    path = tmp_path / f"text{kind}{packer}"
    path.write_bytes(PACKERS[packer](CONTENTS[kind]))
    assert documents(path) == DOCUMENTS


def test_saved_data_set(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"body": RECORDS}).save_to_disk(tmp_path / "saved")
    assert documents(tmp_path / "saved", text_field="body") == DOCUMENTS
    with pytest.raises(UserError, match="no column 'text'; its columns: body"):
        documents(tmp_path / "saved")


def test_blank_lines_inside_a_record_are_no_boundaries(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "一\n\n二\n \n三"}) + "\n\n" + json.dumps({"text": "四"}))
    assert documents(path) == [["一", "二", "三"], ["四"]]


def test_globs_are_sorted_and_order_is_kept(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "deep/c.txt", "z.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x\n")
    sources = resolve((str(tmp_path / "z.jsonl"), str(tmp_path / "**" / "*.txt"), "-", "hf:a/b"))
    names = [
        Path(s.name).name if "/" in s.name and s.name[:3] != "hf:" else s.name for s in sources
    ]
    assert names == ["z.jsonl", "a.txt", "b.txt", "c.txt", "-", "hf:a/b"]
    assert [s.format for s in sources] == ["jsonl", "text", "text", "text", "text", "datasets"]


def test_a_name_with_glob_characters_is_a_name(tmp_path: Path) -> None:
    path = tmp_path / "part[1].txt"
    path.write_text("x\n")
    assert [s.name for s in resolve((str(path),))] == [str(path)]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [((), "no input given"), (("none.txt",), "none.txt does not exist"), (("{dir}",), "its files")],
)
def test_inputs_that_name_nothing(tmp_path: Path, inputs: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(tuple(i.replace("{dir}", str(tmp_path)) for i in inputs))


@pytest.mark.parametrize("packer", [".gz", ".zst"])
def test_cut_off_compressed_file(tmp_path: Path, packer: str) -> None:
    path = tmp_path / f"text.txt{packer}"
    path.write_bytes(PACKERS[packer](TEXT.encode() * 50)[:-6])
    with pytest.raises(UserError, match=r"text\.txt\..* not a complete compressed file"):
        documents(path)


def test_not_parquet_and_wrong_column(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="not a parquet file"):
        documents(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(CONTENTS[".parquet"])
    with pytest.raises(UserError, match="no column 'body'; its columns: id, text"):
        documents(tmp_path / "b.parquet", text_field="body")


def read_all(data: bytes, name: str, directory: Path, on_error: OnError) -> tuple[str, Tally]:
    path = directory / name
    path.write_bytes(data)
    tally = Tally()
    blocks = [
        block
        for source in resolve((str(path),))
        for segment in read_segments(source, 10, 1000, "text")
        for block in text_blocks(segment, "text", on_error, tally)
    ]
    return "".join(blocks), tally


BAD = [
    ("a.txt", "好\n".encode() * 9 + b"ab\xffcd\nnext\n", "byte 38 is not UTF-8", "lines_not_utf8"),
    ("a.txt", "好\n".encode() + "坏".encode("gb18030"), "byte 4 is not UTF-8", "lines_not_utf8"),
    ("a.jsonl", b'{"text": "a"}\n{"text"\n', "byte 14 and after is not a JSON", "records_not_json"),
    ("a.jsonl", b'{"text": "a"}\n{"text": 5}\n', "'text' is int", "records_without_text"),
    ("a.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "'text' is missing", "records_without_text"),
    ("a.jsonl", b'{"text": "a"}\n"\xff"\n', "byte 15 is not UTF-8", "records_not_utf8"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n', "surrogate", "records_not_utf8"),
    ("a.jsonl", b'[1]\n{"text": "a"}\n', "is list, not text", "records_without_text"),
]


@pytest.mark.parametrize(("name", "data", "message", "reason"), BAD)
def test_bad_input_is_named_and_refused_or_counted(
    tmp_path: Path, name: str, data: bytes, message: str, reason: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_all(data, name, tmp_path, "refuse")
    assert name in str(error.value)
    text, tally = read_all(data, name, tmp_path, "skip")
    assert tally.counts[reason] == 1
    assert len(tally.examples) == 1
    assert name in tally.examples[0]
    assert message in tally.examples[0]
    assert "a" in text or "好" in text


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".parquet"])
def test_a_text_without_line_ends_is_cut_between_characters(tmp_path: Path, kind: str) -> None:
    text = "x" + "中文" * 2_000_000
    contents = {
        ".txt": text.encode(),
        ".jsonl": json.dumps({"text": text}).encode(),
        ".parquet": parquet_bytes([text]),
    }
    path = tmp_path / f"a{kind}"
    path.write_bytes(contents[kind])
    lines = [
        line
        for segment in read_segments(resolve((str(path),))[0], 1 << 20, 1 << 21, "text")
        for block in text_blocks(segment, "text", "refuse", Tally())
        for line in block.split("\n")
    ]
    assert "".join(lines) == text
    assert 2 < len([line for line in lines if line]) < 30


def test_reading_stops_at_a_record_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs_module, "MAX_RECORD_BYTES", 1000)
    monkeypatch.setattr(inputs_module, "READ_BYTES", 100)
    with pytest.raises(
        UserError, match=r"a\.jsonl: byte 0: a record of 5,000 bytes, more than 1,000"
    ):
        read_all(b"x" * 5000, "a.jsonl", tmp_path, "refuse")


def cut_all(data: bytes, segment_bytes: int, max_bytes: int, read_bytes: int) -> list[bytes]:
    """Cut `data` as the reader does, with reads of any size."""
    buffer, segments, place = bytearray(), [], 0
    while place < len(data) or buffer:
        cut = _cut(buffer, segment_bytes - 1, max_bytes, place >= len(data))
        if cut is None:
            buffer += data[place : place + read_bytes]
            place += read_bytes
            continue
        segments.append(bytes(buffer[: cut[0]]))
        del buffer[: cut[0]]
    return segments


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(st.sampled_from("ab \t\r\n\n\n中"), max_size=120),
    segment_bytes=st.integers(1, 30),
    extra=st.integers(0, 40),
)
def test_segments_do_not_depend_on_reads(text: str, segment_bytes: int, extra: int) -> None:
    """Cutting loses nothing, cuts at line ends, and splits a document only beyond the limit."""
    data = text.encode()
    max_bytes = segment_bytes + extra
    segments = cut_all(data, segment_bytes, max_bytes, 10**6)
    assert b"".join(segments) == data
    assert all(block.endswith(b"\n") for block in segments[:-1])
    for read_bytes in (1, 2, 7):
        assert cut_all(data, segment_bytes, max_bytes, read_bytes) == segments


def test_reader_resumes_its_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """read_segments, which skips what it has searched, cuts where a fresh search would."""
    data = ("一二三\n" * 5 + " \t\r\n" + "长" * 30 + "\n").encode() * 20
    expected = cut_all(data, 50, 400, 10**6)
    (tmp_path / "a.txt").write_bytes(data)
    for read_bytes in (1, 3, 64):
        monkeypatch.setattr(inputs_module, "READ_BYTES", read_bytes)
        source = TextSource(str(tmp_path / "a.txt"), "text", len(data))
        segments = list(read_segments(source, 50, 400, "text"))
        assert [s.data for s in segments] == expected
        assert [s.offset for s in segments] == [
            sum(map(len, expected[:i])) for i in range(len(expected))
        ]


def test_chunks_hold_whole_segments_of_all_sources(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(TEXT)
    sources = resolve((str(tmp_path / "*.txt"),))
    chunks = list(read_chunks(sources, 70, 10, "text"))
    assert len(chunks) > 1
    data = b"".join(s.data for chunk in chunks for s in chunk if isinstance(s.data, bytes))
    assert data == TEXT.encode() * 2
    assert max(map(len, chunks)) > 1
    assert all(sum(s.size for s in chunk) <= 70 for chunk in chunks)


def test_read_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    lines = list(read_lines(resolve((str(tmp_path / "a.txt"),)), "text"))
    assert [line for line in lines if line] == [line for lines in DOCUMENTS for line in lines]
