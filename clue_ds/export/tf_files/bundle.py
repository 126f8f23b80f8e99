"""TensorFlow's checkpoint files (format V2, "TensorBundle"), read and written without TensorFlow.

    PREFIX.index                 a LevelDB table: "" -> header, variable name -> `Entry`
    PREFIX.data-00000-of-00001   the tensors, little-endian, one after the other, sorted by name

An index ends with a footer of 48 bytes: the handles (offset and size, varints) of a meta block and
of an index block, zeros, and a magic number. The index block's rows point at data blocks, whose
rows are the entries. In a block each key is stored without the prefix that it shares with the key
before it, except every 16th; the positions of those ("restarts") follow the rows. Every block is
followed by one byte for its compression and a masked checksum.

Guarantees: both files equal those of TensorFlow's Saver byte for byte (`make test-clients` compares
them); one tensor at a time is in memory; the checksum of every block and tensor is compared when it
is read. TF1 and TF2 checkpoints with any number of shards are read. Format V1, partitioned
variables and big-endian files are refused with a message.

Rejected: TensorFlow (1.4 GB to move 200 arrays). Formats: tensorflow/core/protobuf/
tensor_bundle.proto and LevelDB's doc/table_format.md.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import numpy as np

from clue_ds.errors import UserError
from clue_ds.export import protobuf
from clue_ds.export.protobuf import WireError
from clue_ds.files import PLACEHOLDER_SIZE, refuse_placeholder

MAGIC = 0xDB4775248B80FB57
FOOTER_SIZE = 48
TRAILER_SIZE = 5  # compression type, checksum
RESTART_INTERVAL = 16
BLOCK_SIZE = 262_144  # at which TensorFlow begins a new block; 500 variables take 40 kB

# tensorflow.DataType -> numpy; bfloat16 has no numpy type and is widened on reading.
BFLOAT16, STRING = 14, 7
DTYPES = {1: "<f4", 2: "<f8", 3: "<i4", 9: "<i8", 19: "<f2", BFLOAT16: "<u2"}
NUMBERS = {np.dtype(name): number for number, name in DTYPES.items() if number != BFLOAT16}


class Entry(NamedTuple):
    """One row of the index: type, shape and place of a tensor. `crc` is masked (see `mask`)."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int
    is_partitioned: bool = False


def mask(crc: int) -> int:
    """A checksum as it is stored: rotated by 15 bits, plus a constant.

    LevelDB does this because the CRC of data that contains its own CRC is of little use.
    """
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def data_file(prefix: str | Path, shard: int = 0, num_shards: int = 1) -> Path:
    return Path(f"{prefix}.data-{shard:05d}-of-{num_shards:05d}")


def index_file(prefix: str | Path) -> Path:
    return Path(f"{prefix}.index")


# --------------------------------------------------------------------------------------- writing


def write(prefix: str | Path, tensors: Iterable[tuple[str, np.ndarray]]) -> dict[str, Entry]:
    """Write both files; `tensors` must be sorted by name. Returns the entries of the index."""
    entries: dict[str, Entry] = {}
    offset, last = 0, ""
    with open(data_file(prefix), "wb") as file:
        for name, array in tensors:
            assert name > last, f"{name} after {last}: the index is a sorted table"
            number = NUMBERS[array.dtype]
            data = array.astype(DTYPES[number], copy=False).tobytes()
            file.write(data)
            crc = mask(google_crc32c.value(data))
            entries[name] = Entry(number, array.shape, 0, offset, len(data), crc)
            offset, last = offset + len(data), name
    index_file(prefix).write_bytes(_table(entries))
    return entries


def _table(entries: dict[str, Entry]) -> bytes:
    """A LevelDB table: one data block, an empty meta block, an index block with one row, footer."""
    # BundleHeaderProto: num_shards = 1, version.producer = 1. Its key "" sorts before every name.
    header = protobuf.integer(1, 1) + protobuf.message(3, protobuf.integer(1, 1))
    rows = [(b"", header), *((name.encode(), _encode(e)) for name, e in entries.items())]
    data = _block(rows)
    assert len(data) < BLOCK_SIZE, "TensorFlow would cut this index into several blocks"
    out = _seal(data)
    data_handle = protobuf.varint(0) + protobuf.varint(len(data))
    # The only row of the index block: a key not before the last one in the data block.
    meta, index = _block([]), _block([(_successor(rows[-1][0]), data_handle)])
    handles = b""
    for block in (meta, index):
        handles += protobuf.varint(len(out)) + protobuf.varint(len(block))
        out += _seal(block)
    return out + handles.ljust(FOOTER_SIZE - 8, b"\0") + struct.pack("<Q", MAGIC)


def _encode(entry: Entry) -> bytes:
    # BundleEntryProto, whose zero fields are left out as proto3 does. A scalar's shape is an empty
    # message, and a dimension of size 0 an empty dimension.
    dims = [protobuf.message(2, protobuf.integer(1, n) if n else b"") for n in entry.shape]
    parts = [protobuf.integer(1, entry.dtype), protobuf.message(2, *dims)]
    if entry.shard:
        parts.append(protobuf.integer(3, entry.shard))
    if entry.offset:
        parts.append(protobuf.integer(4, entry.offset))
    if entry.size:
        parts.append(protobuf.integer(5, entry.size))
    return b"".join(parts) + protobuf.fixed32(6, entry.crc)


def _block(rows: list[tuple[bytes, bytes]]) -> bytes:
    """A block: each key without the prefix shared with the key before it, except every 16th."""
    out, restarts, last = bytearray(), [0], b""
    for number, (key, value) in enumerate(rows):
        shared = 0
        if number % RESTART_INTERVAL:
            while shared < min(len(key), len(last)) and key[shared] == last[shared]:
                shared += 1
        elif number:
            # This key is stored whole, so that a reader can begin here.
            restarts.append(len(out))
        for size in (shared, len(key) - shared, len(value)):
            out += protobuf.varint(size)
        out += key[shared:] + value
        last = key
    return bytes(out) + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


def _seal(block: bytes) -> bytes:
    """A block and its trailer: the compression (0, none) and the masked checksum of both."""
    block += b"\0"
    return block + struct.pack("<I", mask(google_crc32c.value(block)))


def _successor(key: bytes) -> bytes:
    """The shortest key that is not before `key`; LevelDB writes this one into the index block."""
    for at, byte in enumerate(key):
        if byte != 0xFF:
            return key[:at] + bytes([byte + 1])
    return key


# --------------------------------------------------------------------------------------- reading


class Reader:
    """The tensors of one checkpoint: `entries` by name, `read(name)` one at a time.

    UserError names the file when it is missing, truncated, damaged or of a kind that isn't read.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        self.path = index_file(prefix)
        if not self.path.is_file():
            old = f"; {prefix} is a checkpoint of format V1" if self.prefix.is_file() else ""
            raise UserError(
                f"{self.path} does not exist{old}; give a directory with a TensorFlow V2 "
                "checkpoint (.index and .data-*)"
            )
        content = self.path.read_bytes()
        refuse_placeholder(self.path, content[:PLACEHOLDER_SIZE])
        try:
            rows = dict(_rows(content))
            header = protobuf.scalars(rows.pop(b""))
            self.entries = {key.decode(): _decode(value) for key, value in rows.items()}
        except (WireError, KeyError, ValueError, struct.error, TypeError) as error:
            raise UserError(
                f"{self.path} is not the index of a TensorFlow V2 checkpoint, or is truncated or "
                f"damaged ({error}); copy or download it again"
            ) from None
        if header.get(2, 0):
            raise UserError(
                f"{self.path} was written by a big-endian machine; save it again with TensorFlow "
                "on a little-endian one"
            )
        self.num_shards = int(header.get(1, 1))
        self._check_files()

    def _is_inside(self, entry: Entry) -> bool:
        """Whether shard, shape and place of an entry are such that a file can hold it."""
        numbers = (*entry.shape, entry.offset, entry.size)
        return entry.shard < self.num_shards and all(number < 1 << 48 for number in numbers)

    def _check_files(self) -> None:
        for shard in range(self.num_shards):
            path = data_file(self.prefix, shard, self.num_shards)
            ends = [e.offset + e.size for e in self.entries.values() if e.shard == shard]
            found, needed = path.stat().st_size if path.is_file() else -1, max(ends, default=0)
            if found < 0:
                raise UserError(f"{path} is missing; copy it to where {self.path.name} is")
            if needed:
                refuse_placeholder(path)
            if found < needed:
                raise UserError(
                    f"{path} has {found:,} bytes where {self.path.name} needs {needed:,}: it is "
                    "truncated; copy or download it again"
                )

    def read(self, name: str) -> np.ndarray:
        """The tensor called `name`; bfloat16 is returned as float32."""
        entry = self._entry(name)
        if entry.dtype not in DTYPES:
            raise UserError(
                f"{self.path}: {name} has TensorFlow type {entry.dtype}, which is not read; "
                "save the checkpoint again without this variable"
            )
        dtype = np.dtype(DTYPES[entry.dtype])
        if math.prod(entry.shape) * dtype.itemsize != entry.size:
            raise UserError(
                f"{self.path}: {name} has {entry.size} bytes for shape {entry.shape}; the index is "
                "damaged, so copy or download it again"
            )
        data = self._bytes(entry)
        self._compare(name, data)
        array = np.frombuffer(data, dtype).reshape(entry.shape).astype(dtype.newbyteorder("="))
        if entry.dtype == BFLOAT16:
            # The upper half of a float32.
            array = (array.astype(np.uint32) << 16).view(np.float32)
        return array

    def read_string(self, name: str) -> bytes:
        """The one string in the tensor called `name`.

        It is stored as its length (a varint), a masked checksum of the length, and its bytes. The
        checksum in the index counts the length as 4 bytes, or as 8 from 4 GiB on.
        """
        entry = self._entry(name)
        data = self._bytes(entry)
        try:
            length, at = protobuf.read_varint(data, 0)
        except WireError:
            length, at = -1, 0
        if entry.dtype != STRING or math.prod(entry.shape) != 1 or at + 4 + length != len(data):
            raise UserError(
                f"{self.path}: {name} is not one string; the index is damaged, so copy or download "
                "it again"
            )
        size = struct.pack("<I" if length < 1 << 32 else "<Q", length)
        self._compare(name, size + data[at:])
        return data[at + 4 :]

    def _entry(self, name: str) -> Entry:
        entry = self.entries[name]
        if not self._is_inside(entry):
            raise UserError(
                f"{self.path}: {name} has an impossible place or shape; the index is damaged, so "
                "copy or download it again"
            )
        if entry.is_partitioned:
            raise UserError(
                f"{self.path}: {name} is a partitioned variable, which is not supported; save it "
                "again with TensorFlow without a partitioner"
            )
        return entry

    def _bytes(self, entry: Entry) -> bytes:
        with open(data_file(self.prefix, entry.shard, self.num_shards), "rb") as file:
            file.seek(entry.offset)
            return file.read(entry.size)

    def _compare(self, name: str, data: bytes) -> None:
        """UserError unless `data`, as the checksum of `name` counts it, has that checksum."""
        entry = self.entries[name]
        if mask(google_crc32c.value(data)) != entry.crc:
            path = data_file(self.prefix, entry.shard, self.num_shards)
            raise UserError(
                f"{path}: the bytes of {name} (from {entry.offset:,}) do not match their checksum: "
                "the file is damaged; copy or download it again"
            )


def _rows(table: bytes) -> Iterable[tuple[bytes, bytes]]:
    """Every (key, value) of a LevelDB table."""
    if len(table) < FOOTER_SIZE or struct.unpack("<Q", table[-8:])[0] != MAGIC:
        raise WireError("it does not end with the footer of a table")
    footer = table[-FOOTER_SIZE:]
    at = 0
    for _ in range(2):  # skip the handle of the meta block, which TensorFlow leaves empty
        _, at = protobuf.read_varint(footer, at)
    for _, handle in _block_rows(_open_block(table, footer[at:])):
        yield from _block_rows(_open_block(table, handle))


def _open_block(table: bytes, handle: bytes) -> bytes:
    """The block at `handle` (its offset and size), after comparing its checksum."""
    offset, at = protobuf.read_varint(handle, 0)
    size, _ = protobuf.read_varint(handle, at)
    sealed = table[offset : offset + size + TRAILER_SIZE]
    if len(sealed) != size + TRAILER_SIZE:
        raise WireError("a block is cut off")
    if mask(google_crc32c.value(sealed[:-4])) != struct.unpack("<I", sealed[-4:])[0]:
        raise WireError(f"the block at byte {offset} does not match its checksum")
    if sealed[size]:
        raise WireError("its blocks are compressed")
    return sealed[:size]


def _block_rows(block: bytes) -> Iterable[tuple[bytes, bytes]]:
    """(key, value) of every row; the restarts at the end are not needed to read all rows."""
    (num_restarts,) = struct.unpack("<I", block[-4:])
    end = len(block) - 4 * (num_restarts + 1)
    at, key = 0, b""
    while at < end:
        shared, at = protobuf.read_varint(block, at)
        rest, at = protobuf.read_varint(block, at)
        size, at = protobuf.read_varint(block, at)
        key = key[:shared] + block[at : at + rest]
        yield key, block[at + rest : at + rest + size]
        at += rest + size


def _decode(value: bytes) -> Entry:
    found = protobuf.scalars(value)
    shape = found.get(2, b"")
    if not isinstance(shape, bytes):
        raise WireError("a shape is not a message")
    dims = [protobuf.scalars(d).get(1, 0) for n, d in protobuf.fields(shape) if n == 2]  # type: ignore[arg-type]
    numbers = [int(found.get(n, 0)) for n in (1, 3, 4, 5, 6)]
    dtype, shard, offset, size, crc = numbers
    return Entry(dtype, tuple(map(int, dims)), shard, offset, size, crc, 7 in found)
