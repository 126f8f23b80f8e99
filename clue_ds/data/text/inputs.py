"""Reading raw text: files, globs, standard input, Hugging Face data sets.

The reader turns its input into a sequence of `Segment`s: raw bytes cut at document boundaries
(text) or record boundaries (jsonl), or rows of a table. It does nothing but cut, so that one reader
can feed many workers, which decode and parse (decode.py).

Guarantees: where segments are cut depends only on the input and the requested sizes, so any number
of workers makes the same corpus. Memory is bounded by the size of a segment and of the largest
record; no file is ever held whole. A parquet file can't be read from front to back, so one that is
compressed or comes through a pipe is copied to a temporary file first.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import gzip
import hashlib
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from clue_ds.data.text.choices import FileFormat, InputFormat
from clue_ds.data.text.zstd import ZstdReader
from clue_ds.errors import UserError

READ_BYTES = 1 << 20
# A longer line of text is no sentence; it is cut to bound the memory that it takes.
MAX_LINE_BYTES = 1 << 22
# A record can't be cut, so a longer one is an error; this is a novel of eleven million characters.
MAX_RECORD_BYTES = 1 << 25
# Rows of a table that are read at a time; few, because documents may be large.
_BATCH_ROWS = 100
_M_MMAP_THRESHOLD = -3  # of malloc.h
_BLANK_LINE = re.compile(rb"\n[ \t\r]*\n")
_MAGIC_GZIP, _MAGIC_ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


class TextSource(NamedTuple):
    """One input: a file, standard input ("-"), or a Hugging Face data set (hf: or a directory)."""

    name: str
    format: FileFormat | Literal["datasets"]
    num_bytes: int | None  # on disk; None when unknown

    @property
    def path(self) -> Path:
        return Path(self.name)


class Segment(NamedTuple):
    """Consecutive whole documents or records of one source, not decoded yet."""

    format: Literal["text", "jsonl", "rows"]
    source: str
    offset: int  # of the first byte in the unpacked text; of the first row in a table
    data: bytes | list[Any]
    splits_document: bool = False  # its last document was too long and goes on in the next segment
    num_source_bytes: int = 0  # bytes of the source read since the segment before, for progress

    @property
    def size(self) -> int:
        if isinstance(self.data, bytes):
            return len(self.data)
        return sum(3 * len(row) for row in self.data if isinstance(row, str))


class Chunk(list[Segment]):
    """The segments that become one shard. Pickling a chunk for another process empties it here.

    An executor keeps the arguments of a task until its result arrives, and the generators between
    reader and executor keep the last chunk too: without this the reader would hold their text.
    """

    def __reduce__(self) -> Any:
        segments = list(self)
        self.clear()
        return Chunk, (segments,)


def resolve(inputs: tuple[str, ...], format: InputFormat = "auto") -> list[TextSource]:
    """The sources that `inputs` name, in order; matches of a glob are sorted.

    UserError for an input that doesn't exist.
    """
    if not inputs:
        raise UserError("no input given; give files, globs, hf:NAME or - for standard input")
    sources: list[TextSource] = []
    for pattern in inputs:
        if pattern == "-" or pattern.startswith("hf:"):
            table = pattern != "-"
            kind = "datasets" if table else "text" if format == "auto" else format
            sources.append(TextSource(pattern, kind, None))  # type: ignore[arg-type]
            continue
        names = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
        if not names:
            raise UserError(f"input {pattern} does not exist and matches no file")
        sources += [_file_source(Path(name), format) for name in names if _wanted(name, pattern)]
    return sources


def _wanted(name: str, pattern: str) -> bool:
    """A glob such as corpus/** also matches directories, which are ignored."""
    return name == pattern or Path(name).is_file()


def _file_source(path: Path, format: InputFormat) -> TextSource:
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return TextSource(str(path), "datasets", None)
        raise UserError(
            f"input {path} is a directory; give its files by a glob such as '{path}/*.txt' (only a "
            "directory that was written by save_to_disk of Hugging Face datasets is read as it is)"
        )
    if format != "auto":
        return TextSource(str(path), format, path.stat().st_size)
    suffixes = [s for s in path.suffixes if s not in (".gz", ".zst", ".zstd")]
    kinds = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
    kind = kinds.get(suffixes[-1], "text") if suffixes else "text"
    return TextSource(str(path), kind, path.stat().st_size)  # type: ignore[arg-type]


def read_segments(
    source: TextSource, segment_bytes: int, max_bytes: int, text_field: str
) -> Iterator[Segment]:
    """Segments of at least `segment_bytes` (except the last) and at most about `max_bytes`."""
    if source.format == "datasets":
        yield from _table_segments(source, _dataset_batches(source, text_field), segment_bytes)
        return
    with contextlib.ExitStack() as stack:
        if source.name == "-":
            raw: IO[bytes] = sys.stdin.buffer
        else:
            raw = stack.enter_context(open(source.name, "rb"))
        try:
            if source.format == "parquet":
                batches = _parquet_batches(raw, source, text_field)
                yield from _table_segments(source, batches, segment_bytes)
            else:
                yield from _byte_segments(source, raw, segment_bytes, max_bytes)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(
                f"input {source.name} is not a complete compressed file ({error}); download or "
                "copy it again"
            ) from None


def _unpacked(raw: IO[bytes]) -> Any:
    """The unpacked stream if the first bytes of `raw` are gzip's or zstandard's, else `raw`."""
    head = raw.peek(4)[:4] if hasattr(raw, "peek") else b""
    if head.startswith(_MAGIC_GZIP):
        return gzip.GzipFile(fileobj=raw)
    return ZstdReader(raw) if head.startswith(_MAGIC_ZSTD) else raw


def _seekable(raw: IO[bytes]) -> IO[bytes]:
    """`raw`, or a temporary file with its unpacked content."""
    stream = _unpacked(raw)
    if stream is raw and raw.seekable():
        return raw
    file = tempfile.TemporaryFile()  # noqa: SIM115 (closed, and gone, with the last reference)
    shutil.copyfileobj(stream, file, READ_BYTES)
    file.seek(0)
    return file


def _position(raw: IO[bytes]) -> int:
    return raw.tell() if raw.seekable() else 0


def _byte_segments(
    source: TextSource, raw: IO[bytes], segment_bytes: int, max_bytes: int
) -> Iterator[Segment]:
    stream = _unpacked(raw)
    format: Literal["text", "jsonl"] = "text" if source.format == "text" else "jsonl"
    buffer = bytearray()
    offset = position = searched = 0
    at_end = False
    while not at_end or buffer:
        cut = _cut(buffer, max(searched, segment_bytes - 1), max_bytes, format, at_end)
        if cut is None:
            # The next search may start here: a blank line that is not complete yet begins at the
            # last line feed or later.
            last = buffer.rfind(b"\n", searched)
            searched = last if last >= 0 else len(buffer)
            block = stream.read(READ_BYTES)
            at_end = not block
            buffer += block
            if format == "jsonl" and len(buffer) > segment_bytes + MAX_RECORD_BYTES:
                raise UserError(
                    f"input {source.name} has a record of more than {MAX_RECORD_BYTES >> 20} MiB "
                    f"after byte {offset}; split it into several records"
                )
            continue
        end, splits_document = cut
        now = _position(raw)
        data = bytes(buffer[:end])
        yield Segment(format, source.name, offset, data, splits_document, now - position)
        del buffer[:end]
        offset, position, searched = offset + end, now, 0


def _cut(
    buffer: bytearray, begin: int, max_bytes: int, format: str, at_end: bool
) -> tuple[int, bool] | None:
    """(end of the next segment, whether that splits a document); None when more must be read.

    A segment ends at the first boundary that starts at `begin` or later, so the result doesn't
    depend on how much of the input is in `buffer`.
    """
    everything = (len(buffer), False) if at_end else None
    if len(buffer) <= begin:
        return everything
    if format == "jsonl":
        end = buffer.find(b"\n", begin)
        return (end + 1, False) if end >= 0 else everything
    blank = _BLANK_LINE.search(buffer, begin, max_bytes)
    if blank:
        return blank.end(), False
    if len(buffer) < max_bytes:
        return everything
    limit = max_bytes + MAX_LINE_BYTES
    end = buffer.find(b"\n", max_bytes - 1, limit)
    # A line feed at the end of the buffer may be the end of the text: then no document is split.
    if 0 <= end < len(buffer) - 1:
        return end + 1, True
    return (character_start(buffer, limit), True) if len(buffer) > limit else everything


def character_start(data: bytes | bytearray, at: int) -> int:
    """The offset at which the UTF-8 character that byte `at` belongs to begins."""
    return next((i for i in (at, at - 1, at - 2, at - 3) if data[i] & 0xC0 != 0x80), at)


def _parquet_batches(
    raw: IO[bytes], source: TextSource, text_field: str
) -> Iterator[tuple[list[Any], int]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Arrow's own allocators keep freed memory, 70 MiB after a few shards. So does glibc's for
    # blocks below a threshold, which it raises to the largest freed block unless it is set.
    pa.set_memory_pool(pa.system_memory_pool())
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, READ_BYTES)
    try:
        # With pyarrow's defaults a whole column of a row group is read at once.
        table = pq.ParquetFile(_seekable(raw), buffer_size=READ_BYTES, pre_buffer=False)
    except pa.ArrowInvalid as error:
        raise UserError(
            f"input {source.name} is not a parquet file ({error}); download or copy it again, or "
            "give its format with --format"
        ) from None
    if text_field not in table.schema_arrow.names:
        raise UserError(
            f"input {source.name} has no column {text_field!r}; its columns: "
            f"{', '.join(table.schema_arrow.names)}; choose one with --text-field"
        )
    num_rows = max(1, table.metadata.num_rows)
    batches = table.iter_batches(_BATCH_ROWS, columns=[text_field], use_threads=False)
    for batch in batches:
        num_bytes = (source.num_bytes or 0) * batch.num_rows // num_rows
        yield batch.column(0).to_pylist(), num_bytes


def _dataset_batches(source: TextSource, text_field: str) -> Iterator[tuple[list[Any], int]]:
    """Rows of hf:NAME, hf:NAME:SPLIT, hf:NAME:CONFIG:SPLIT, or of a save_to_disk directory."""
    import datasets

    try:
        if source.name.startswith("hf:"):
            name, *rest = source.name.removeprefix("hf:").split(":")
            split = rest.pop() if rest else "train"
            rows = datasets.load_dataset(name, *rest, split=split, streaming=True)
        else:
            rows = datasets.load_from_disk(source.name)
            rows = rows["train"] if isinstance(rows, datasets.DatasetDict) else rows
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"data set {source.name} can't be opened: {error}; check its name and the network"
        ) from None
    if rows.column_names is not None and text_field not in rows.column_names:
        raise UserError(
            f"data set {source.name} has no column {text_field!r}; its columns: "
            f"{', '.join(rows.column_names)}; choose one with --text-field"
        )
    for batch in rows.iter(batch_size=_BATCH_ROWS):
        yield list(batch[text_field]), 0


def _table_segments(
    source: TextSource, batches: Iterator[tuple[list[Any], int]], segment_bytes: int
) -> Iterator[Segment]:
    rows: list[Any] = []
    first_row = size = num_source_bytes = 0
    for batch, batch_bytes in batches:
        rows += batch
        size += sum(3 * len(row) for row in batch if isinstance(row, str))
        num_source_bytes += batch_bytes
        if size >= segment_bytes:
            yield Segment("rows", source.name, first_row, rows, False, num_source_bytes)
            first_row += len(rows)
            rows, size, num_source_bytes = [], 0, 0
    if rows:
        yield Segment("rows", source.name, first_row, rows, False, num_source_bytes)


def read_chunks(
    sources: list[TextSource], chunk_bytes: int, segment_bytes: int, text_field: str
) -> Iterator[Chunk]:
    """The input in chunks of at most `chunk_bytes`, or of one segment; chunk i becomes shard i.

    A document that is longer than a chunk is cut, so a segment is never much larger than a chunk.
    """
    chunk, size = Chunk(), 0
    max_bytes = segment_bytes + chunk_bytes
    for source in sources:
        for segment in read_segments(source, segment_bytes, max_bytes, text_field):
            if chunk and size + segment.size > chunk_bytes:
                yield chunk
                chunk, size = Chunk(), 0
            chunk.append(segment)
            size += segment.size
    if chunk:
        yield chunk


def chunk_hash(chunk: list[Segment]) -> str:
    """SHA-256 of all that a chunk holds: chunks with equal hashes become equal shards."""
    digest = hashlib.sha256()
    for segment in chunk:
        digest.update(f"{segment.format}:{segment.offset}:".encode())
        if isinstance(segment.data, bytes):
            digest.update(segment.data)
        else:
            digest.update(repr(segment.data).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
