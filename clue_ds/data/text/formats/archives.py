"""The members of zip and tar archives, one after the other, as streams.

Guarantees: members come in the order of the archive, each with its own name; nothing is written to
disk under the name of a member. An archive that is cut off or damaged raises `Damaged`: a zip by
its directory and the checksums of its members, a tar also where Python's tarfile would take a
damaged header for the end. An archive inside an archive is refused.
"""

from __future__ import annotations

import lzma
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import IO, Any, NamedTuple

from clue_ds.data.text.formats.kinds import refuse
from clue_ds.data.text.formats.streams import Damaged, Readable
from clue_ds.errors import UserError

# What operating systems add to archives and nobody packed.
_ADDED = re.compile(r"(?:^|/)(?:__MACOSX/|\._|\.DS_Store$|Thumbs\.db$|desktop\.ini$)")
_OFFICE = re.compile(r"\[Content_Types\]\.xml$|(?:word|xl|ppt)/")
_ARRAYS = re.compile(r".*\.npy$|[^/]+/data\.pkl$")
_MIME_TYPES = {b"application/epub": "epub", b"application/vnd.oasis": "office"}
# A name or a table of attributes in a tar has at most this size; tarfile would read any.
_MAX_TAR_TEXT = 1 << 20
_METADATA = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    OverflowError,
    ValueError,
    NotImplementedError,
    OSError,  # a damaged offset is before the beginning of the file
)


class Member(NamedTuple):
    """A file of an archive; `stream` can be read until the next member is asked for."""

    name: str
    stream: Readable
    num_packed_bytes: int  # of the archive before this member, as far as known


class _Checked:
    """A stream of the standard library whose errors are raised as `Damaged`."""

    def __init__(self, stream: Any, errors: tuple[type[Exception], ...]) -> None:
        self._stream, self._errors = stream, errors

    def read(self, num_bytes: int) -> bytes:
        return _checked(lambda: self._stream.read(num_bytes), self._errors)


def _checked(function: Callable[[], Any], errors: tuple[type[Exception], ...]) -> Any:
    try:
        return function()
    except errors as error:
        raise Damaged(str(error) or type(error).__name__) from None


def is_wanted(name: str) -> bool:
    """Whether a member is a file that somebody packed."""
    return not _ADDED.search(name)


def zip_members(file: IO[bytes], name: str) -> Iterator[Member]:
    """The members of the zip archive in a file that can seek."""
    archive = _checked(lambda: zipfile.ZipFile(file), _ZIP_ERRORS)
    with archive:
        entries = archive.infolist()
        _check_number(file, len(entries))
        kind = _kind_of_zip(archive)
        if kind is not None:
            refuse(name, kind)
        closed = [entry.filename for entry in entries if entry.flag_bits & 1]
        if closed:
            raise UserError(
                f"input {name} is an encrypted zip archive ({closed[0]}); unpack it with its "
                "password, and give the files"
            )
        packed = 0
        for entry in entries:
            if is_wanted(entry.filename) and entry.file_size:
                stream = _checked(lambda entry=entry: archive.open(entry), _ZIP_ERRORS)  # type: ignore[misc]
                with stream:
                    yield Member(entry.filename, _Checked(stream, _ZIP_ERRORS), packed)
            elif entry.CRC and not entry.file_size:
                raise Damaged(f"{entry.filename} has a checksum, but no content")
            packed += entry.compress_size


def _check_number(file: IO[bytes], num_entries: int) -> None:
    """Compare the number of members with the one at the end of a zip archive.

    zipfile doesn't, and loses the members behind an entry whose length is damaged.
    """
    tail_bytes = 22 + 0xFFFF  # the last record, and the longest comment
    file.seek(-min(tail_bytes, file.seek(0, 2)), 2)
    tail = file.read(tail_bytes)
    at = tail.rfind(b"PK\x05\x06")
    said = int.from_bytes(tail[at + 10 : at + 12], "little")
    if said not in (0xFFFF, num_entries & 0xFFFF):  # 0xFFFF: a 64-bit record has the number
        raise Damaged(f"its directory has {num_entries} members instead of {said}")


def _kind_of_zip(archive: zipfile.ZipFile) -> str | None:
    """The kind of document or data that a zip archive is, if it is not just files."""
    names = archive.namelist()
    if "mimetype" in names and archive.getinfo("mimetype").file_size < 200:
        mime = _checked(lambda: archive.read("mimetype"), (*_ZIP_ERRORS, RuntimeError))
        for start, kind in _MIME_TYPES.items():
            if mime.startswith(start):
                return kind
    if any(map(_OFFICE.match, names)):
        return "office"
    files = [name for name in names if is_wanted(name)]
    if any(_ARRAYS.fullmatch(name) for name in files):
        return "torch"
    return None


class _TarEntry(tarfile.TarInfo):
    """A header of a tar; one that is damaged is an error, and never the end of the archive."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _TarEntry:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None

    def _proc_member(self, tar: tarfile.TarFile) -> Any:
        if self.type in _METADATA and self.size > _MAX_TAR_TEXT:
            raise tarfile.ReadError("the name of a member is too long")
        return super()._proc_member(tar)  # type: ignore[misc]


_TAR_ERRORS = (tarfile.TarError, ValueError, OverflowError, struct.error, EOFError, IndexError)


def tar_members(stream: Readable) -> Iterator[Member]:
    """The members of a tar archive, read from front to back."""
    tar = _checked(
        lambda: tarfile.open(fileobj=stream, mode="r|", tarinfo=_TarEntry),  # type: ignore[call-overload]
        _TAR_ERRORS,
    )
    while (entry := _checked(tar.next, _TAR_ERRORS)) is not None:
        tar.members = []  # it would keep the headers of all members
        if not entry.isreg() or not entry.size or not is_wanted(entry.name):
            continue
        content = _checked(lambda entry=entry: tar.extractfile(entry), _TAR_ERRORS)  # type: ignore[misc]
        yield Member(str(PurePosixPath(entry.name)), _Checked(content, _TAR_ERRORS), 0)
    # To its end, because the checksum of a compressed archive comes last.
    rest = _Checked(tar.fileobj, _TAR_ERRORS)
    while block := rest.read(1 << 16):
        if block.strip(b"\x00"):
            raise Damaged("data follow the end of the archive; `tar -i` unpacks joined archives")
