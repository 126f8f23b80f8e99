"""Streams whose first bytes can be looked at, and unpacking of compressed ones.

Guarantees: a compressed stream that is cut off or damaged raises `Damaged`, and is never taken for
one that ends early; several compressed streams one after the other (pigz, pbzip2, pzstd, `cat a.xz
b.xz`) are read as one text. Memory is bounded however much a few bytes unpack to.

Rejected: the file classes of bz2 and lzma and zstandard's stream_reader. They take what follows the
first stream for rubbish and ignore it when its header is damaged, and zstandard's reports the end
of the file where a frame breaks off: the corpus would silently lose the rest.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable
from typing import IO, Any, Protocol

import zstandard

from clue_ds.data.text.formats.kinds import COMPRESSED, HEAD_BYTES, recognise

# Packed bytes that are read at a time. Few, because zstandard unpacks all that it is given, and
# repetitive text unpacks to thousands of times more.
_PACKED_BYTES = 1 << 11
_MAX_LAYERS = 3
# A dictionary of `xz --lzma2=dict=` beyond this is refused; that of `xz -9` has 64 MiB.
_LZMA_BYTES = 1 << 28


class Damaged(Exception):
    """A compressed file or an archive is cut off or damaged; the text says how."""


class Readable(Protocol):
    def read(self, num_bytes: int, /) -> bytes: ...


class HeadStream:
    """A stream with its first bytes in `head`; reading begins with them.

    base: the file under it if the stream is that file from its byte `begin` on, else None.
    """

    def __init__(self, stream: Readable, base: IO[bytes] | None = None) -> None:
        self.base = base
        self.begin = base.tell() if base is not None and base.seekable() else 0
        self._stream = stream
        blocks: list[bytes] = []
        missing = HEAD_BYTES
        while missing > 0 and (block := stream.read(missing)):
            blocks.append(block)
            missing -= len(block)
        self.head = b"".join(blocks)  # of ZSTD's longer than asked for
        self.is_whole = missing > 0
        self._left = self.head

    def read(self, num_bytes: int) -> bytes:
        """The next bytes, at most `num_bytes` or, after unpacking, some more; b"" at the end."""
        if not self._left:
            return self._stream.read(num_bytes)
        block, self._left = self._left[:num_bytes], self._left[num_bytes:]
        return block


class _Unpacker:
    """Reads the text of consecutive compressed streams."""

    def __init__(self, raw: Readable, new: Callable[[], Any], padding: bytes = b"") -> None:
        self._raw, self._new, self._padding = raw, new, padding
        self._unpack = new()
        self._begun = False
        self._packed = b""

    def read(self, num_bytes: int) -> bytes:
        texts: list[bytes] = []
        while num_bytes > 0:
            text = self._next(num_bytes)
            if text is None:
                break
            texts.append(text)
            num_bytes -= len(text)
        return b"".join(texts)

    def _next(self, num_bytes: int) -> bytes | None:
        """Some more text, which may be empty; None at the end."""
        bounds_output = hasattr(self._unpack, "needs_input")
        if not self._packed and (not bounds_output or self._unpack.needs_input):
            self._packed = self._raw.read(_PACKED_BYTES)
            if not self._packed:
                if self._begun:
                    raise Damaged("it is cut off")
                return None
            if not self._begun:
                self._packed = self._packed.lstrip(self._padding)
                if not self._packed:
                    return b""
        packed, self._packed, self._begun = self._packed, b"", True
        try:
            arguments = (packed, num_bytes) if bounds_output else (packed,)
            text: bytes = self._unpack.decompress(*arguments)
        except (OSError, ValueError, lzma.LZMAError, zstandard.ZstdError) as error:
            raise Damaged(str(error)) from None
        if self._unpack.eof:
            self._packed = self._unpack.unused_data.lstrip(self._padding)
            self._unpack, self._begun = self._new(), False
        return text


class _Gzip:
    """gzip.GzipFile, which is faster than zlib called from Python, with our kind of error."""

    def __init__(self, raw: Readable) -> None:
        self._file = gzip.GzipFile(fileobj=raw)  # type: ignore[call-overload]

    def read(self, num_bytes: int) -> bytes:
        try:
            return self._file.read(num_bytes)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise Damaged(str(error)) from None


def _lzma(raw: Readable) -> Readable:
    new = lambda: lzma.LZMADecompressor(memlimit=_LZMA_BYTES)  # noqa: E731
    return _Unpacker(raw, new, padding=b"\x00")


_UNPACKERS: dict[str, Callable[[Readable], Readable]] = {
    "gzip": _Gzip,
    "bzip2": lambda raw: _Unpacker(raw, bz2.BZ2Decompressor),
    "xz": _lzma,
    "lzma": _lzma,
    "zstd": lambda raw: _Unpacker(raw, zstandard.ZstdDecompressor().decompressobj),
}
assert set(_UNPACKERS) == set(COMPRESSED)


def unpacked(stream: HeadStream) -> tuple[HeadStream, str | None]:
    """(the stream, with compression removed; what `recognise` says of it)."""
    kind = recognise(stream.head)
    for _ in range(_MAX_LAYERS):
        if kind not in COMPRESSED:
            return stream, kind
        stream = HeadStream(_UNPACKERS[kind](stream))
        kind = recognise(stream.head)
    if kind in COMPRESSED:
        raise Damaged(f"it was compressed more than {_MAX_LAYERS} times")
    return stream, kind
