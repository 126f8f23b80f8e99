"""What a file is, recognised by its first bytes, and what is said of the kinds that are not read.

Guarantees: the name of a file decides only between kinds of text that look alike (a text, JSON
lines, a table), never whether something is text at all, so nothing of an archive, a document or an
error page gets into a corpus. docs/corpus.md has the table of kinds.

Rejected: libmagic, which knows thousands of kinds, but not which of them a corpus can be made of,
and takes JSON lines and tables for plain text.
"""

from __future__ import annotations

import csv
import json
import re
import tarfile
from typing import Literal, NoReturn

from clue_ds.data.text.choices import FileFormat
from clue_ds.errors import UserError

# Bytes at the beginning of a stream that decide what it is.
HEAD_BYTES = 1 << 16
BOM = b"\xef\xbb\xbf"
# Streams that hold one other stream.
COMPRESSED = ("gzip", "zstd", "bzip2", "xz", "lzma")
ARCHIVES = ("zip", "tar")
TextFormat = Literal["text", "jsonl", "array", "csv", "parquet"]

# (where, bytes, kind) for every kind that a fixed sequence of bytes begins.
_SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\x1f\x8b", "gzip"),
    (0, b"\x28\xb5\x2f\xfd", "zstd"),
    (0, b"\xfd7zXZ\x00", "xz"),
    (0, b"]\x00\x00", "lzma"),
    (0, b"PK\x03\x04", "zip"),
    (0, b"PK\x05\x06", "zip"),
    (0, b"PK\x07\x08", "split zip"),
    (257, b"ustar", "tar"),
    (0, b"PAR1", "parquet"),
    (0, b"PARE", "encrypted parquet"),
    (0, b"7z\xbc\xaf\x27\x1c", "7z"),
    (0, b"Rar!\x1a\x07", "rar"),
    (0, b"\x1f\x9d", "compress"),
    (0, b"\x04\x22\x4d\x18", "lz4"),
    (0, b"LZIP", "lzip"),
    (0, b"\x89LZO\x00", "lzop"),
    (0, b"\xff\x06\x00\x00sNaPpY", "snappy"),
    (0, b"%PDF-", "pdf"),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "old office"),
    (0, b"{\\rtf", "rtf"),
    (0, b"%!PS", "postscript"),
    (0, b"SQLite format 3\x00", "sqlite"),
    (0, b"\x89HDF\r\n", "hdf5"),
    (0, b"\x93NUMPY", "numpy"),
    (0, b"ARROW1\x00\x00", "arrow"),
    (0, b"\xff\xff\xff\xff", "arrow"),
    (0, b"Obj\x01", "avro"),
    (0, b"\x89PNG\r\n", "picture"),
    (0, b"\xff\xd8\xff", "picture"),
    (0, b"GIF8", "picture"),
    (0, b"\x7fELF", "program"),
    (0, b"version https://git-lfs.github.com/spec/", "lfs pointer"),
    (0, b"/annex/objects/", "annex pointer"),
    (0, b"\xff\xfe\x00\x00", "utf-32"),
    (0, b"\x00\x00\xfe\xff", "utf-32"),
    (0, b"\xff\xfe", "utf-16"),
    (0, b"\xfe\xff", "utf-16"),
)
_BZIP2 = re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90|.{0,5}\Z)", re.DOTALL)
_PICKLE = re.compile(rb"\x80[\x02-\x05][\x00-\x1f(}\]c\x8c\x95X]")
_UNPACK = "unpack it, and give the files"
_AGAIN = "download it again, and look at the address"
_EXTRACT = "extract its text first"
_ICONV = "convert the file (for example with iconv -f {} -t UTF-8)"
# What is said of each kind that is not read.
REFUSED: dict[str, str] = {
    "split zip": f"is one volume of a zip archive; join the volumes, {_UNPACK}",
    "encrypted parquet": "is an encrypted parquet file; decrypt it first",
    "7z": f"is a 7z archive; {_UNPACK}, for example with: 7z x FILE",
    "rar": f"is a RAR archive; {_UNPACK}, for example with: unrar x FILE",
    "compress": "is a file of `compress` (.Z); pipe its text: zcat FILE | clue-ds ... -",
    "lz4": "is an lz4 file; pipe its text: lz4 -dc FILE | clue-ds ... -",
    "lzip": "is an lzip file; pipe its text: lzip -dc FILE | clue-ds ... -",
    "lzop": "is an lzop file; pipe its text: lzop -dc FILE | clue-ds ... -",
    "snappy": "is a snappy file; unpack it first",
    "pdf": f"is a PDF document; {_EXTRACT}, for example with: pdftotext FILE",
    "office": f"is an Office document (Word, Excel, PowerPoint or OpenDocument); {_EXTRACT}, for "
    "example with: soffice --headless --convert-to txt:Text FILE",
    "old office": f"is an Office document of the old binary formats; {_EXTRACT}, for example "
    "with: soffice --headless --convert-to txt:Text FILE",
    "epub": f"is an EPUB book; {_EXTRACT}, for example with: pandoc FILE -t plain",
    "rtf": f"is an RTF document; {_EXTRACT}, or read it as it is with --format text",
    "postscript": f"is a PostScript document; {_EXTRACT}, for example with: ps2ascii FILE",
    "html": f"is an HTML page: a download that failed, or a page of the web; {_AGAIN}, or "
    f"{_EXTRACT} (--format text reads it as it is)",
    "xml": "is XML: a dump, or the error message of a download that failed; extract its text "
    "first, for example with WikiExtractor (--format text reads it as it is)",
    "object": "has JSON objects that take several lines each; put each record on a line of its "
    "own, for example with: jq -c . FILE, or jq -c '.data[]' FILE for a list inside an object",
    "sqlite": "is an SQLite data base; export its texts as .jsonl or .csv",
    "hdf5": "is an HDF5 file; export its texts as .jsonl or .csv",
    "numpy": "is a NumPy file; export its texts as .jsonl or .csv",
    "torch": "is a file of PyTorch or NumPy arrays; export its texts as .jsonl or .csv",
    "pickle": "is a Python pickle, which may run code when it is opened; export its texts as "
    ".jsonl or .csv",
    "arrow": "is an Arrow file; give the directory that save_to_disk wrote, or export parquet",
    "avro": "is an Avro file; export its texts as .jsonl or .csv",
    "picture": "is a picture; recognise its text first",
    "program": "is a program; give texts",
    "lfs pointer": "is a Git LFS pointer and not the file itself; fetch that with: git lfs pull",
    "annex pointer": "is a git-annex pointer and not the file itself; fetch that with: git annex "
    "get FILE",
    "utf-16": f"is UTF-16: byte 0 is not UTF-8 (byte order mark); {_ICONV.format('UTF-16')}",
    "utf-32": f"is UTF-32: byte 0 is not UTF-8 (byte order mark); {_ICONV.format('UTF-32')}",
    "zeros": "begins with NUL bytes only, as a download that broke off leaves it; download or "
    "copy it again",
    "binary": "is not text but binary data of a kind that is not known; give UTF-8 text, jsonl, "
    "csv or parquet",
}

_MARKUP = re.compile(
    rb"<(?:(!doctype html|html|head|body)|(\?xml|!doctype|mediawiki|feed|rss))\b", re.IGNORECASE
)
_COMMENT = re.compile(rb"(?:<!--.*?-->\s*)+", re.DOTALL)
_KEY = rb'"(?:[^"\\\n]|\\.)*"\s*:'
_OBJECT_LINE = re.compile(rb"\{[ \t]*" + _KEY)
_OBJECT_LINES = re.compile(rb"\{[ \t\r]*\n\s*" + _KEY)
_ARRAY_OF_OBJECTS = re.compile(rb"\[\s*\{\s*(?:\}|" + _KEY + rb"|\Z)")
_COLUMN = re.compile(r'"?[A-Za-z_][A-Za-z0-9_.-]{0,40}"?')
# Bytes that no text in any encoding of Chinese has: control characters, except those of layout.
_CONTROLS = bytes({*range(32), 127} - {*b"\t\n\r\f\v\x1b"})
_CONTROL_SHARE = 0.03
_MIN_BINARY_BYTES = 256


def refuse(name: str, kind: str) -> NoReturn:
    """Raise the UserError for an input called `name` of a kind that is not read."""
    raise UserError(f"input {name} {REFUSED[kind]}")


def recognise(head: bytes) -> str | None:
    """The kind of a stream that is no text, from its first HEAD_BYTES; None for one that may be."""
    for at, signature, kind in _SIGNATURES:
        if head.startswith(signature, at):
            return kind
    if _BZIP2.match(head):
        return "bzip2"
    # The skippable frames in which pzstd keeps sizes.
    if head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50:
        return "zstd"
    if _PICKLE.match(head):
        return "pickle"
    if _is_old_tar(head):
        return "tar"
    if len(head) >= 64 and not head.strip(b"\x00"):
        return "zeros"
    return "binary" if _is_binary(head) else None


def _is_old_tar(head: bytes) -> bool:
    """Whether a tar header without the word "ustar" begins here; its checksum decides."""
    try:
        tarfile.TarInfo.frombuf(head[:512], "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError):
        return False
    return True


def _is_binary(head: bytes) -> bool:
    if len(head) < _MIN_BINARY_BYTES:
        return False
    if len(head) - len(head.translate(None, _CONTROLS)) < _CONTROL_SHARE * len(head):
        return False
    try:
        head[:-3].decode()  # without a last character that may be cut
    except UnicodeDecodeError as error:
        return error.start < len(head) - 6
    return False


def text_format(
    head: bytes, at_end: bool, declared: FileFormat, is_given: bool
) -> tuple[TextFormat | None, str]:
    """(how to read a text, ""), or (None, its kind) for one that is refused.

    head: its first bytes; at_end: whether they are all; declared: the format that --format
    (is_given) or the name says.
    """
    text = head.removeprefix(BOM).lstrip(b" \t\r\n")
    if is_given:
        is_array = declared == "jsonl" and _is_array(text, at_end)
        return ("array" if is_array else declared), ""
    markup = _MARKUP.match(_COMMENT.sub(b"", text, count=1) if text[:4] == b"<!--" else text)
    if markup:
        return None, "html" if markup[1] else "xml"
    if _OBJECT_LINES.match(text):
        return None, "object"
    if _OBJECT_LINE.match(text):
        return "jsonl", ""
    if _ARRAY_OF_OBJECTS.match(text) or (declared == "jsonl" and _is_array(text, at_end)):
        return "array", ""
    if declared == "text" and looks_like_table(head, at_end):
        return "csv", ""
    return declared, ""


def _is_array(text: bytes, at_end: bool) -> bool:
    """Whether a JSON text is one array, or several in a row, and not lines with a list each."""
    if not text.startswith(b"["):
        return False
    line, _, rest = text.partition(b"\n")
    following = rest.lstrip()[:1]
    if following in (b"", b"["):
        return True
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return True
    return False


def looks_like_table(head: bytes, at_end: bool) -> bool:
    """Whether a line of column names comes first, and then lines with as many fields."""
    lines = head.removeprefix(BOM).decode("utf-8", "replace").splitlines(keepends=True)
    if not at_end:
        lines = lines[:-1]
    if len(lines) < 2:
        return False
    for delimiter in "\t,;":
        names = lines[0].rstrip("\r\n").split(delimiter)
        if len(names) < 2 or not all(map(_COLUMN.fullmatch, names)):
            continue
        rows = (
            csv.reader(lines[1:], delimiter=delimiter, quoting=csv.QUOTE_NONE)
            if delimiter == "\t"
            else csv.reader(lines[1:], delimiter=delimiter)
        )
        try:
            widths = [len(row) for row, _ in zip(rows, range(3), strict=False) if row]
        except csv.Error:
            continue
        if widths and set(widths) == {len(names)}:
            return True
    return False
