"""Reading zstandard frames so that a truncated file is an error.

zstandard's own stream_reader reports the end of the file where a frame breaks off, and the corpus
would silently lose the rest. Consecutive frames (pzstd, `cat a.zst b.zst`) are read as one text.
Few compressed bytes are read at a time, because repetitive text unpacks to thousands of times more.
"""

from __future__ import annotations

from typing import IO

import zstandard

PACKED_BYTES = 1 << 11


class ZstdReader:
    """Reads the unpacked text; raises EOFError when the last frame is not complete."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._frame_begun = False

    def read(self, num_bytes: int) -> bytes:
        """The next `num_bytes` of text or some more; fewer at the end, and b"" after it."""
        texts: list[bytes] = []
        while num_bytes > 0:
            block = self._raw.read(PACKED_BYTES)
            if not block:
                if self._frame_begun:
                    raise EOFError("the last zstandard frame is cut off")
                break
            texts.append(self._unpack(block))
            num_bytes -= len(texts[-1])
        return b"".join(texts)

    def _unpack(self, block: bytes) -> bytes:
        texts = []
        while block:
            try:
                texts.append(self._frame.decompress(block))
            except zstandard.ZstdError as error:
                raise EOFError(str(error)) from None
            self._frame_begun = not self._frame.eof
            block = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
        return b"".join(texts)
