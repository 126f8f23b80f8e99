"""Which inputs the words of a command line name: files, globs, pipes, standard input, data sets."""

from __future__ import annotations

import glob
import os
import re
import stat
from pathlib import Path
from typing import Literal, NamedTuple

from clue_ds.data.text.choices import FileFormat, InputFormat
from clue_ds.errors import UserError

_STDIN = ("/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")
# Files that the shell or the caller has opened, such as bash's <(...): their names mean nothing.
_DESCRIPTOR = re.compile(r"/dev/fd/\d+|/proc/(?:self|\d+)/fd/\d+")
_FORMATS: dict[str, FileFormat] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
}
_PACKED = (".gz", ".zst", ".zstd", ".bz2", ".xz", ".lzma")


class TextSource(NamedTuple):
    """One input: a file or a pipe, standard input ("-"), or a Hugging Face data set (hf: or a
    directory)."""

    name: str
    # What --format or the name says; content decides between kinds of text if it is the name.
    format: FileFormat | Literal["datasets"]
    num_bytes: int | None  # on disk; None when unknown, as for a pipe
    is_given: bool = False  # whether --format said it

    @property
    def path(self) -> Path:
        return Path(self.name)

    @property
    def identity(self) -> list[str | int | None]:
        """What it counts by when a run is repeated: name without directories, and size.

        What comes through a pipe or from standard input has no name, because the shell gives its
        pipes other numbers each time; it is compared by its content. A format counts if it was
        given and is another than the one of the name.
        """
        if self.num_bytes is None and self.format != "datasets":
            return ["-", None]
        shown: list[str | int | None] = [self.path.name, self.num_bytes]
        if self.is_given and self.format != (declared_format(self.name) or "text"):
            shown.append(self.format)
        return shown


def matches(pattern: str) -> list[str]:
    """The files that a word names: one file of this name, else those that match it as a glob."""
    if os.path.exists(pattern):
        return [pattern]
    return [name for name in sorted(glob.glob(pattern, recursive=True)) if not os.path.isdir(name)]


def declared_format(name: str) -> FileFormat | None:
    """The format that the extension of a file name says, in letters of any case."""
    suffixes = [s for s in map(str.lower, Path(name).suffixes) if s not in _PACKED]
    return _FORMATS.get(suffixes[-1]) if suffixes else None


def resolve(inputs: tuple[str, ...], format: InputFormat = "auto") -> list[TextSource]:
    """The sources that `inputs` name, in order; matches of a glob are sorted.

    UserError for an input that doesn't exist.
    """
    if not inputs:
        raise UserError("no input given; give files, globs, hf:NAME or - for standard input")
    sources: list[TextSource] = []
    for pattern in inputs:
        if pattern == "-" or pattern in _STDIN:
            kind = "text" if format == "auto" else format
            sources.append(TextSource("-", kind, None, format != "auto"))
            continue
        if pattern.startswith("hf:"):
            sources.append(TextSource(pattern, "datasets", None))
            continue
        names = matches(pattern)
        if not names:
            raise UserError(f"input {pattern} does not exist and matches no file")
        sources += [_file_source(Path(name), format) for name in names]
    if [source.name for source in sources].count("-") > 1:
        raise UserError("standard input is given more than once; it can be read only once")
    return sources


def _file_source(path: Path, format: InputFormat) -> TextSource:
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return TextSource(str(path), "datasets", None)
        raise UserError(
            f"input {path} is a directory; give its files by a glob such as '{path}/*.txt' (only a "
            "directory that was written by save_to_disk of Hugging Face datasets is read as it is)"
        )
    status = path.stat()
    has_size = stat.S_ISREG(status.st_mode) and not _DESCRIPTOR.fullmatch(str(path))
    num_bytes = status.st_size if has_size else None
    if format != "auto":
        return TextSource(str(path), format, num_bytes, is_given=True)
    return TextSource(str(path), declared_format(path.name) or "text", num_bytes)
