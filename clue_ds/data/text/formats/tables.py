"""Tables: the texts of one column of csv, tsv and parquet files and of Hugging Face data sets.

Each reader yields (rows, bytes of the source) in batches. A row is the value of the column or, for
a row of csv that can't be used, a `BadRecord` that says why; decode.py refuses or counts it.
"""

from __future__ import annotations

import csv
import ctypes
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from clue_ds.data.text.formats.parts import Part, seekable
from clue_ds.data.text.formats.streams import Readable
from clue_ds.data.text.sources import TextSource
from clue_ds.errors import UserError

# Rows that are read at a time; few, because documents may be large.
_BATCH_ROWS = 100
_READ_BYTES = 1 << 20
_M_MMAP_THRESHOLD = -3  # of malloc.h
# Stands in a line of csv for one that is too long. No byte that is not UTF-8 decodes to it.
_TOO_LONG = "\udfff"


class BadRecord(NamedTuple):
    """A record that the reader can't give to a worker: the count that it goes to, and why."""

    reason: str
    where: str  # and what; without the name of the file, which is no part of the input's hash


Batch = tuple[list[Any], int]


def column_missing(name: str, text_field: str, columns: list[str], more: str = "") -> UserError:
    """The error for a table, called `name`, that lacks the column of the text."""
    shown = ", ".join(columns[:50])
    return UserError(
        f"{name} has no column {text_field!r}; its columns: {shown}; choose one with "
        f"--text-field{more}"
    )


def csv_batches(part: Part, text_field: str, max_bytes: int) -> Iterator[Batch]:
    """The column of a csv or tsv file, whose first line names the columns.

    Fields are separated by the one of tab, comma and semicolon that occurs most in that line.
    Between commas and semicolons a field may be quoted, and then have line ends; between tabs
    quotes that enclose a whole field are removed, and a line end always ends the row. A row with
    another number of fields than the first line is bad, and so is a line of more than `max_bytes`.
    """
    csv.field_size_limit(max_bytes)
    lines = _decoded_lines(part.stream, max_bytes)
    header = next((line for line in lines if line.strip("\ufeff \t\r\n")), "")
    if any("\ud800" <= character <= "\udfff" for character in header):
        raise UserError(
            f"input {part.name}: the line of its column names is not UTF-8; convert the file (for "
            "example with iconv -f GB18030 -t UTF-8)"
        )
    header = header.removeprefix("\ufeff").rstrip("\r\n")
    delimiter = max("\t,;", key=header.count)
    tabs = delimiter == "\t"
    try:
        columns = next(csv.reader([header], delimiter=delimiter, strict=True), [])
    except csv.Error as error:
        raise UserError(
            f"input {part.name}: its first line is no line of column names ({error}); correct it, "
            "or read the file as plain text with --format text"
        ) from None
    columns = [column.strip() for column in columns]
    if text_field not in columns:
        more = ", or read the file as plain text with --format text"
        raise column_missing(f"input {part.name}", text_field, columns, more)
    reader = csv.reader(
        lines,
        delimiter=delimiter,
        quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
        strict=not tabs,
    )
    rows: list[Any] = []
    position = 0
    for row in _csv_rows(reader, columns, columns.index(text_field), _unquoted if tabs else str):
        rows.append(row)
        if len(rows) == _BATCH_ROWS:
            now = part.position()
            yield rows, now - position
            rows, position = [], now
    yield rows, part.position() - position


def _unquoted(field: str) -> str:
    if len(field) > 1 and field[0] == field[-1] == '"':
        return field[1:-1].replace('""', '"')
    return field


def _csv_rows(
    reader: Any, columns: list[str], column: int, convert: Callable[[str], str]
) -> Iterator[str | BadRecord]:
    while True:
        where = f"line {reader.line_num + 2}"
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            text = f"{where} and after is not a row of csv ({error})"
            yield BadRecord("records_not_csv", text)
            continue
        if not row or row == [""]:
            continue
        text = row[column] if column < len(row) else ""
        if any(_TOO_LONG in field for field in row):
            yield BadRecord("records_too_long", f"{where} is too long for a record")
        elif len(row) != len(columns):
            fields = f"{len(row)} field{'s' * (len(row) != 1)}"
            text = f"{where} has {fields}, but the line of column names has {len(columns)}"
            yield BadRecord("records_not_csv", text)
        elif any("\udc80" <= character <= "\udcff" for character in text):
            yield BadRecord("records_not_utf8", f"{where} is not UTF-8")
        else:
            yield convert(text)


def _decoded_lines(stream: Readable, max_bytes: int) -> Iterator[str]:
    """The lines of a stream with their ends; bytes that are not UTF-8 become surrogates."""
    left = b""
    is_too_long = False
    while block := stream.read(_READ_BYTES):
        first, *lines = block.split(b"\n")
        left += first
        for line in lines:
            yield _decoded(left, is_too_long or len(left) > max_bytes) + "\n"
            left, is_too_long = line, False
        if len(left) > max_bytes:
            left, is_too_long = b"", True
    if left or is_too_long:
        yield _decoded(left, is_too_long)


def _decoded(line: bytes, is_too_long: bool) -> str:
    return _TOO_LONG if is_too_long else line.decode("utf-8", "surrogateescape")


def parquet_batches(part: Part, source: TextSource, text_field: str) -> Iterator[Batch]:
    """The column of a parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Arrow's own allocators keep freed memory, 70 MiB after a few shards. So does glibc's for
    # blocks below a threshold, which it raises to the largest freed block unless it is set.
    pa.set_memory_pool(pa.system_memory_pool())
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _READ_BYTES)
    with seekable(part.stream) as file:
        try:
            # With pyarrow's defaults a whole column of a row group is read at once.
            table = pq.ParquetFile(file, buffer_size=_READ_BYTES, pre_buffer=False)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(
                f"input {part.name} is not a parquet file ({error}); download or copy it again, "
                "or give its format with --format"
            ) from None
        if text_field not in table.schema_arrow.names:
            raise column_missing(f"input {part.name}", text_field, table.schema_arrow.names)
        num_rows = max(1, table.metadata.num_rows)
        batches = table.iter_batches(_BATCH_ROWS, columns=[text_field], use_threads=False)
        read = 0
        while True:
            try:
                batch = next(batches, None)
                values = [] if batch is None else batch.column(0).to_pylist()
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                raise UserError(
                    f"input {part.name} is damaged after row {read} ({error}); download or copy "
                    "it again"
                ) from None
            if batch is None:
                return
            read += batch.num_rows
            yield values, (source.num_bytes or 0) * batch.num_rows // num_rows


def dataset_batches(source: TextSource, text_field: str) -> Iterator[Batch]:
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
        raise column_missing(f"data set {source.name}", text_field, rows.column_names)
    for batch in rows.iter(batch_size=_BATCH_ROWS):
        yield list(batch[text_field]), 0
