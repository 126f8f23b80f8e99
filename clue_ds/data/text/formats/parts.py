"""The parts of an input: the text in a file, or each member of an archive, unpacked and recognised.

Guarantees: what a part is follows from its content (kinds.py); compression and archives are peeled
off whatever the names are; what is not read is refused with its kind. Only what has to be read from
its end (zip, parquet) and comes compressed or through a pipe is copied to a temporary file first.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple

from clue_ds.data.text.formats.archives import tar_members, zip_members
from clue_ds.data.text.formats.kinds import (
    ARCHIVES,
    HEAD_BYTES,
    REFUSED,
    TextFormat,
    recognise,
    refuse,
    text_format,
)
from clue_ds.data.text.formats.streams import Damaged, HeadStream, unpacked
from clue_ds.data.text.sources import TextSource, declared_format
from clue_ds.errors import UserError

_COPY_BYTES = 1 << 20


class Part(NamedTuple):
    """Text, records or a table that can be read from front to back."""

    name: str  # for messages
    format: TextFormat
    stream: HeadStream
    position: Callable[[], int]  # bytes of the source that were read so far


@contextlib.contextmanager
def complete(name: str) -> Iterator[None]:
    """Raise what `Damaged` says of the input called `name` as a UserError."""
    try:
        yield
    except Damaged as error:
        raise UserError(
            f"input {name} is not a complete compressed file or archive ({error}); download or "
            "copy it again"
        ) from None


def parts(source: TextSource) -> Iterator[Part]:
    """All parts of a file, a pipe or standard input; none if it is empty."""
    with contextlib.ExitStack() as stack:
        if source.name == "-":
            raw: IO[bytes] = sys.stdin.buffer
        else:
            raw = stack.enter_context(open(source.name, "rb"))
        with complete(source.name):
            position = raw.tell if raw.seekable() else lambda: 0
            stream, kind = unpacked(HeadStream(raw, raw))
            if not stream.head:
                return
            if kind == "zip":
                file = stack.enter_context(seekable(stream))
                members = zip_members(file, source.name)
            elif kind == "tar":
                members = tar_members(stream)
            else:
                yield _part(source.name, source, stream, kind, position)
                return
            for member in members:
                name = f"{source.name} ({member.name})"
                with complete(name):
                    inner, kind = unpacked(HeadStream(member.stream))
                    if kind in ARCHIVES:
                        raise UserError(
                            f"input {name} is an archive inside an archive; unpack the outer one, "
                            "and give the files"
                        )
                    declared = declared_format(member.name) or "text"
                    inside = source if source.is_given else source._replace(format=declared)
                    so_far = member.num_packed_bytes
                    at = position if kind == "tar" else lambda so_far=so_far: so_far
                    yield _part(name, inside, inner, kind, at)


def _part(
    name: str,
    source: TextSource,
    stream: HeadStream,
    kind: str | None,
    position: Callable[[], int],
) -> Part:
    if kind == "parquet":
        return Part(name, "parquet", stream, position)
    if kind is not None:
        assert kind in REFUSED, kind
        refuse(name, kind)
    assert source.format != "datasets"
    format, refused = text_format(stream.head, stream.is_whole, source.format, source.is_given)
    if format is None:
        refuse(name, refused)
    return Part(name, format, stream, position)


@contextlib.contextmanager
def seekable(stream: HeadStream) -> Iterator[IO[bytes]]:
    """A file with the whole content of `stream` that can seek: its own, or a temporary copy."""
    if stream.base is not None and stream.base.seekable() and not stream.begin:
        stream.base.seek(0)
        yield stream.base
        return
    with tempfile.TemporaryFile() as file:
        while block := stream.read(_COPY_BYTES):
            file.write(block)
        file.seek(0)
        yield file


def check_kinds(sources: list[TextSource]) -> None:
    """Refuse files of kinds that are not read before any is read; pipes are left alone."""
    for source in sources:
        if source.num_bytes:
            next(parts(source), None)


def is_packed(source: TextSource) -> bool:
    """Whether a file holds much more text than bytes."""
    if source.num_bytes is None:
        return False
    with open(source.name, "rb") as file:
        kind = recognise(file.read(HEAD_BYTES))
    return kind is not None and kind not in REFUSED and kind != "tar"
