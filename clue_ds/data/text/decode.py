"""From segments to text: decoding, reading records, and counting what is dropped.

Guarantees: every line and every record of the input is counted exactly once, as accepted or under
the reason why it was dropped, and messages name a bad one by its file and its byte or row. With
on_error "refuse" the first bad one is an error; with "skip" only that line or record is dropped.
Rejected: decoding with errors="replace", which would teach the model U+FFFD.
"""

from __future__ import annotations

import codecs
import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from clue_ds.data.text.choices import OnError
from clue_ds.data.text.formats.json_records import BadLine, is_blank, parse_line
from clue_ds.data.text.formats.parts import check_kinds
from clue_ds.data.text.formats.tables import BadRecord
from clue_ds.data.text.inputs import (
    MAX_LINE_BYTES,
    Segment,
    character_start,
    read_segments,
)
from clue_ds.data.text.sources import TextSource
from clue_ds.errors import UserError

# Text is handled in blocks of about this size, which fits into a processor's cache.
BLOCK_BYTES = 1 << 20
_MAX_LINE_CHARS = MAX_LINE_BYTES // 3
_MARKS_OF_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# Why a record is dropped: the counts in corpus.json.
REJECTED_RECORDS = (
    "records_not_utf8",
    "records_not_json",
    "records_not_csv",
    "records_too_long",
    "records_without_text",
)
MAX_EXAMPLES = 20
# Samples that are kept of what one rule dropped or changed.
MAX_SAMPLES = 5
# Different unknown characters whose counts a shard's record keeps, the most frequent ones.
MAX_UNKNOWN_PER_SHARD = 2000


@dataclass
class Tally:
    """How many lines, records and documents were accepted or dropped, and why, with examples.

    These sums hold:
    lines = sentences + blank_lines + lines_not_utf8 + lines_without_tokens + lines_held_out +
    lines_REASON for each reason of `options.REASONS`;
    records = records_accepted + the counts of REJECTED_RECORDS;
    documents = num_documents + documents_held_out + documents_emptied + documents_REASON.
    """

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    # Samples of what each rule dropped or changed; how often each unknown text became [UNK].
    samples: dict[str, list[str]] = field(default_factory=dict)
    unknown: Counter[str] = field(default_factory=Counter)

    def reject(self, reason: str, message: str, on_error: OnError) -> None:
        """Count a rejected line or record; with on_error "refuse", raise UserError(message)."""
        if on_error == "refuse":
            raise UserError(message)
        self.counts[reason] += 1
        if len(self.examples) < MAX_EXAMPLES:
            # Not the advice after the semicolon. These texts get into corpus.json, so a change of
            # their wording changes its bytes.
            self.examples.append(message.partition(";")[0])

    def wants_sample(self, rule: str) -> bool:
        return len(self.samples.get(rule, ())) < MAX_SAMPLES

    def sample(self, rule: str, text: str) -> None:
        """Keep `text` as a sample of what `rule` did, unless there are MAX_SAMPLES already."""
        if self.wants_sample(rule) and text not in self.samples.get(rule, ()):
            self.samples.setdefault(rule, []).append(text)

    def add(self, other: Tally) -> None:
        """Add the counts, examples and samples of another tally."""
        self.counts.update(other.counts)
        self.unknown.update(other.unknown)
        if (
            len(self.unknown) > 50 * MAX_UNKNOWN_PER_SHARD
        ):  # rare ones of thousands of shards: 100 bytes each
            self.unknown = Counter(dict(self.unknown.most_common(MAX_UNKNOWN_PER_SHARD)))
        self.examples = (self.examples + other.examples)[:MAX_EXAMPLES]
        for rule, texts in other.samples.items():
            for text in texts:
                self.sample(rule, text)

    def as_dict(self) -> dict[str, Any]:
        """The tally as JSON values, with the most frequent unknown characters only."""
        by_number = sorted(self.unknown.items(), key=lambda item: (-item[1], item[0]))
        return {
            "counts": dict(self.counts),
            "examples": self.examples,
            "samples": self.samples,
            "unknown": dict(by_number[:MAX_UNKNOWN_PER_SHARD]),
        }

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Tally:
        counts, unknown = Counter(value["counts"]), Counter(value["unknown"])
        return cls(counts, value["examples"], value["samples"], unknown)


def text_blocks(
    segment: Segment, text_field: str, on_error: OnError, tally: Tally
) -> Iterator[str]:
    """The text of a segment in blocks of whole lines; a blank line ends a document."""
    if segment.format == "text":
        assert isinstance(segment.data, bytes)
        yield from _decoded_blocks(segment, segment.data, on_error, tally)
        return
    lines: list[str] = []
    size = 0
    for text in _records(segment, text_field, on_error, tally):
        all_lines = text.split("\n")
        kept = [line for line in all_lines if line and not line.isspace()]
        num_blank = len(all_lines) - len(kept)
        # The blank line that is added after the record is not a line of the input.
        tally.counts["lines"] += num_blank - 1
        tally.counts["blank_lines"] += num_blank - 1
        for line in [*kept, ""]:
            for begin in range(0, len(line) or 1, _MAX_LINE_CHARS):
                lines.append(line[begin : begin + _MAX_LINE_CHARS])
                size += 3 * len(lines[-1])
                if size >= BLOCK_BYTES:
                    yield "\n".join(lines) + "\n"
                    lines, size = [], 0
    if lines:
        yield "\n".join(lines) + "\n"


def _decoded_blocks(
    segment: Segment, data: bytes, on_error: OnError, tally: Tally
) -> Iterator[str]:
    begin = 0
    while begin < len(data):
        end = data.find(b"\n", begin + BLOCK_BYTES) + 1 or len(data)
        if end - begin > MAX_LINE_BYTES:
            end = character_start(data, begin + MAX_LINE_BYTES)
        block = data[begin:end]
        try:
            yield block.decode()
        except UnicodeDecodeError:
            # With their ends: a line without one may be dropped, but not the end before it.
            lines = block.split(b"\n")
            lines = [line + b"\n" for line in lines[:-1]] + [lines[-1]]
            offset = segment.offset + begin
            yield "".join(
                line.decode()
                for line, at in zip(lines, _line_offsets(lines, offset), strict=True)
                if _is_utf8(line, at, segment.source, on_error, tally)
            )
        begin = end


def _line_offsets(lines: list[bytes], offset: int) -> Iterator[int]:
    for line in lines:
        yield offset
        offset += len(line)


def _is_utf8(line: bytes, offset: int, source: str, on_error: OnError, tally: Tally) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError as error:
        encoding = "UTF-16" if not offset and line.startswith(_MARKS_OF_UTF16) else "GB18030"
        message = (
            f"{source}: byte {offset + error.start} is not UTF-8 ({error.reason}); convert the "
            f"file (for example with iconv -f {encoding} -t UTF-8), or drop such lines with "
            "--on-error skip"
        )
        tally.reject("lines_not_utf8", message, on_error)
        tally.counts["lines"] += 1
        return False
    return True


def _records(segment: Segment, text_field: str, on_error: OnError, tally: Tally) -> Iterator[str]:
    """The text of each acceptable record."""
    for where, value in _values(segment, text_field, on_error, tally):
        if not isinstance(value, str):
            kind = "missing or null" if value is None else f"{type(value).__name__}, not text"
            message = f"{where}: {text_field!r} is {kind}; choose the field with --text-field"
            _reject(segment, "records_without_text", message, on_error, tally)
        elif not value or value.isspace():
            tally.counts["records_without_text"] += 1
        elif not _encodes(value):
            message = f"{where}: half of a surrogate pair, which no UTF-8 text can hold; correct it"
            _reject(segment, "records_not_utf8", message, on_error, tally)
        else:
            tally.counts["records_accepted"] += 1
            yield value


def _reject(segment: Segment, reason: str, message: str, on_error: OnError, tally: Tally) -> None:
    full = f"{segment.source}: {message}, or drop such records with --on-error skip"
    tally.reject(reason, full, on_error)


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _values(
    segment: Segment, text_field: str, on_error: OnError, tally: Tally
) -> Iterator[tuple[str, Any]]:
    """(where it is, value of its text field) of each record that can be parsed."""
    if segment.format == "rows":
        for row, value in enumerate(segment.data, start=segment.offset):
            if not isinstance(value, BadRecord):
                tally.counts["records"] += 1
                yield f"row {row}", value
            elif value.reason == "inputs_empty":
                message = f"input {segment.source} is empty; leave it out, or ignore it with"
                tally.reject(value.reason, f"{message} --on-error skip", on_error)
            else:
                tally.counts["records"] += 1
                _reject(segment, value.reason, f"{value.where}; correct it", on_error, tally)
        return
    assert isinstance(segment.data, bytes)
    next_offset = segment.offset
    for line in io.BytesIO(segment.data):  # not split: a record may have tens of megabytes
        offset, next_offset = next_offset, next_offset + len(line)
        if is_blank(line):
            continue
        tally.counts["records"] += 1
        where = f"byte {offset}"
        try:
            record = parse_line(line)
        except BadLine as error:
            if error.byte is not None:
                reason = "records_not_utf8"
                message = f"byte {offset + error.byte} is not UTF-8; convert the file"
            else:
                reason = "records_not_json"
                message = f"{where} and after is not a JSON record ({error.reason}); correct it"
            _reject(segment, reason, message, on_error, tally)
            continue
        yield where, record.get(text_field) if isinstance(record, dict) else record


def read_lines(
    sources: list[TextSource], text_field: str, on_error: OnError = "refuse"
) -> Iterator[str]:
    """All lines of the sources, including blank ones.

    A bad line or record is a UserError, or left out with on_error "skip".
    """
    tally = Tally()
    check_kinds(sources)
    for source in sources:
        for segment in read_segments(source, BLOCK_BYTES, BLOCK_BYTES, text_field):
            for block in text_blocks(segment, text_field, on_error, tally):
                yield from block.split("\n")
