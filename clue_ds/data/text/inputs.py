"""Cutting raw text into segments and chunks, for workers that decode and parse it.

The reader turns its input into a sequence of `Segment`s: raw bytes cut at document boundaries
(text) or record boundaries (jsonl), or rows of a table. It does nothing but cut, so that one reader
can feed many workers (decode.py). What an input is, formats/ finds out.

Guarantees: where segments are cut depends only on the input and the requested sizes, so any number
of workers makes the same corpus. Memory is bounded by the size of a segment and of the largest
record; no file is ever held whole.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from clue_ds.data.text.formats.json_records import ArrayLines
from clue_ds.data.text.formats.parts import Part, complete, parts
from clue_ds.data.text.formats.streams import Readable
from clue_ds.data.text.formats.tables import (
    BadRecord,
    Batch,
    csv_batches,
    dataset_batches,
    parquet_batches,
)
from clue_ds.data.text.sources import TextSource

READ_BYTES = 1 << 20
# A longer line of text is no sentence; it is cut to bound the memory that it takes.
MAX_LINE_BYTES = 1 << 22
# A record can't be cut, so a longer one is bad; this is a novel of eleven million characters.
MAX_RECORD_BYTES = 1 << 25
_BLANK_LINE = re.compile(rb"\n[ \t\r]*\n")


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


def read_segments(
    source: TextSource, segment_bytes: int, max_bytes: int, text_field: str
) -> Iterator[Segment]:
    """Segments of at least `segment_bytes` (except the last) and at most about `max_bytes`."""
    if source.format == "datasets":
        batches = dataset_batches(source, text_field)
        yield from _table_segments(source.name, batches, segment_bytes)
        return
    is_empty = True
    for part in parts(source):
        is_empty = False
        with complete(part.name):
            if part.format == "parquet":
                batches = parquet_batches(part, source, text_field)
                yield from _table_segments(part.name, batches, segment_bytes)
            elif part.format == "csv":
                batches = csv_batches(part, text_field, MAX_RECORD_BYTES)
                yield from _table_segments(part.name, batches, segment_bytes)
            elif part.format == "text":
                yield from _text_segments(part, segment_bytes, max_bytes)
            else:
                yield from _record_segments(part, segment_bytes)
    if is_empty and source.num_bytes != 0:
        # A pipe, or a compressed file or an archive without content.
        yield Segment("rows", source.name, 0, [BadRecord("inputs_empty", "there is no content")])


def _text_segments(part: Part, segment_bytes: int, max_bytes: int) -> Iterator[Segment]:
    buffer = bytearray()
    offset = position = searched = 0
    at_end = False
    while not at_end or buffer:
        cut = _cut(buffer, max(searched, segment_bytes - 1), max_bytes, at_end)
        if cut is None:
            # The next search may start here: a blank line that is not complete yet begins at the
            # last line feed or later.
            last = buffer.rfind(b"\n", searched)
            searched = last if last >= 0 else len(buffer)
            block = part.stream.read(READ_BYTES)
            at_end = not block
            buffer += block
            continue
        end, splits_document = cut
        now = part.position()
        data = bytes(buffer[:end])
        yield Segment("text", part.name, offset, data, splits_document, now - position)
        del buffer[:end]
        offset, position, searched = offset + end, now, 0


def _record_segments(part: Part, segment_bytes: int) -> Iterator[Segment]:
    """Segments of whole lines; a line of more than MAX_RECORD_BYTES becomes a `BadRecord`.

    Only the last line of a segment can be one, because segment_bytes is smaller.
    """
    stream = ArrayLines(part.stream, part.name) if part.format == "array" else part.stream
    buffer = bytearray()
    offset = position = searched = 0
    at_end = False
    while True:
        end = buffer.find(b"\n", max(searched, segment_bytes - 1)) + 1
        if not end and not at_end and len(buffer) - buffer.rfind(b"\n") - 1 <= MAX_RECORD_BYTES:
            searched = len(buffer)
            block = stream.read(READ_BYTES)
            at_end = not block
            buffer += block
            continue
        end = end or len(buffer)
        start = buffer.rfind(b"\n", 0, max(0, end - 1)) + 1  # of the last line
        is_too_long = end - start - buffer.endswith(b"\n", 0, end) > MAX_RECORD_BYTES
        data = bytes(buffer[: start if is_too_long else end])
        now = part.position()
        if data:
            yield Segment("jsonl", part.name, offset, data, False, now - position)
        elif not is_too_long:
            return
        position, searched = now, 0
        offset += len(data)
        del buffer[: len(data)]
        if is_too_long:
            size = _pass_over_line(buffer, stream)
            text = f"byte {offset}: a record of {size:,} bytes, more than {MAX_RECORD_BYTES:,}"
            yield Segment("rows", part.name, offset, [BadRecord("records_too_long", text)])
            offset += size


def _pass_over_line(buffer: bytearray, stream: Readable) -> int:
    """Remove the first line from `buffer` and, where it goes on, from `stream`; its bytes."""
    size = 0
    while (end := buffer.find(b"\n") + 1) == 0:
        size += len(buffer)
        buffer[:] = stream.read(READ_BYTES)
        if not buffer:
            return size
    del buffer[:end]
    return size + end


def _cut(buffer: bytearray, begin: int, max_bytes: int, at_end: bool) -> tuple[int, bool] | None:
    """(end of the next segment of text, whether that splits a document); None to read more.

    A segment ends at the first boundary that starts at `begin` or later, so the result doesn't
    depend on how much of the input is in `buffer`.
    """
    everything = (len(buffer), False) if at_end else None
    if len(buffer) <= begin:
        return everything
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


def _table_segments(name: str, batches: Iterator[Batch], segment_bytes: int) -> Iterator[Segment]:
    rows: list[Any] = []
    first_row = size = num_source_bytes = 0
    for batch, batch_bytes in batches:
        rows += batch
        size += sum(3 * len(row) for row in batch if isinstance(row, str))
        num_source_bytes += batch_bytes
        if size >= segment_bytes:
            yield Segment("rows", name, first_row, rows, False, num_source_bytes)
            first_row += len(rows)
            rows, size, num_source_bytes = [], 0, 0
    if rows:
        yield Segment("rows", name, first_row, rows, False, num_source_bytes)


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
