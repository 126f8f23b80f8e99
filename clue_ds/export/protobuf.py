"""The part of protobuf's wire format that TensorFlow's checkpoints use.

Fields are written in the order given; callers give them in the order of their numbers, as
TensorFlow writes them, and leave out zero and empty scalars, as proto3 does.

Rejected: the protobuf package with compiled .proto files (a generated module for five messages).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


class WireError(ValueError):
    """The bytes are not what a TensorFlow checkpoint holds: bad protobuf, or a bad table."""


def varint(value: int) -> bytes:
    """A non-negative integer, seven bits per byte, low bits first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def integer(number: int, value: int) -> bytes:
    return varint(number << 3 | VARINT) + varint(value)


def fixed32(number: int, value: int) -> bytes:
    return varint(number << 3 | FIXED32) + struct.pack("<I", value)


def message(number: int, *content: bytes | str) -> bytes:
    """A nested message, bytes or text: the length of `content`, then `content` joined."""
    body = b"".join(part.encode() if isinstance(part, str) else part for part in content)
    return varint(number << 3 | BYTES) + varint(len(body)) + body


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, position after it); WireError at the end of `data` or after 10 bytes."""
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise WireError(f"an integer that begins before byte {at} does not end")


def fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of every field: an int, or bytes for fields with a length."""
    at = 0
    while at < len(data):
        tag, at = read_varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == VARINT:
            value, at = read_varint(data, at)
            yield number, value
            continue
        if kind == BYTES:
            size, at = read_varint(data, at)
        elif kind in (FIXED32, FIXED64):
            size = 4 if kind == FIXED32 else 8
        else:
            raise WireError(f"field {number} has wire type {kind}")
        chunk = data[at : at + size]
        if len(chunk) != size:
            raise WireError(f"field {number} is cut off")
        at += size
        yield number, chunk if kind == BYTES else int.from_bytes(chunk, "little")


def scalars(data: bytes) -> dict[int, int | bytes]:
    """The fields of a message, number -> value; of a repeated field the last value."""
    return dict(fields(data))
