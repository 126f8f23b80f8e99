"""TensorFlow's checkpoint files: their bytes, the types read, and the errors for damaged ones."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from clue_ds.errors import UserError
from clue_ds.export import protobuf
from clue_ds.export.tf_files import bundle
from clue_ds.export.tf_files.bundle import Reader, data_file, index_file, mask

# What TensorFlow 2.21's Saver wrote for these three; made again by
# `tests/clients/test_tensorflow.py`, which compares 60 variables and more.
SMALL = {
    "a/bias": np.array([1.5, -2.0], np.float32),
    "a/kernel": np.arange(6, dtype=np.float32).reshape(2, 3),
    "global_step": np.array(7, np.int64),
}


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    path = tmp_path / "bert_model.ckpt"
    bundle.write(path, SMALL.items())
    return path


def test_fixture_of_tensorflow_1_is_written_again_byte_for_byte(
    shared_data: Path, tmp_path: Path
) -> None:
    original = shared_data / "fixtures" / "tf_bert_ckpt" / "bert_model.ckpt"
    reader = Reader(original)
    copy = tmp_path / "copy"
    bundle.write(copy, ((name, reader.read(name)) for name in reader.entries))
    for file in (index_file, data_file):
        assert file(copy).read_bytes() == file(original).read_bytes()


def test_every_kind_of_number_and_shape_comes_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    kinds = ("float32", "float64", "float16", "int32", "int64")
    shapes = ((), (1,), (0,), (3, 0), (2, 3), (70, 40))
    tensors = {
        f"{kind}/{number:02d}": (rng.standard_normal(shape) * 9).astype(kind)
        for kind in sorted(kinds)
        for number, shape in enumerate(shapes)
    }
    bundle.write(tmp_path / "x", tensors.items())
    reader = Reader(tmp_path / "x")
    assert list(reader.entries) == sorted(tensors)
    for name, expected in tensors.items():
        found = reader.read(name)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.tobytes() == expected.tobytes()


def edit_entries(prefix: Path, **changes: object) -> None:
    """Rewrite the index with every entry changed."""
    entries = {n: e._replace(**changes) for n, e in Reader(prefix).entries.items()}
    index_file(prefix).write_bytes(bundle._table(entries))


def test_bfloat16_is_widened(prefix: Path) -> None:
    values = np.array([1.0, -0.5, 3.140625], np.float32)
    words = (values.view(np.uint32) >> 16).astype("<u2")
    bundle.write(prefix, [("w", words.view(np.float16))])
    edit_entries(prefix, dtype=bundle.BFLOAT16)
    assert Reader(prefix).read("w").tolist() == values.tolist()


def with_header(prefix: Path, header: bytes) -> None:
    """Rewrite the index with another BundleHeaderProto."""
    rows = [(n.encode(), bundle._encode(e)) for n, e in Reader(prefix).entries.items()]
    data = bundle._block([(b"", header), *rows])
    out = bundle._seal(data)
    handle = protobuf.varint(0) + protobuf.varint(len(data))
    handles = b""
    for block in (bundle._block([]), bundle._block([(b"z", handle)])):
        handles += protobuf.varint(len(out)) + protobuf.varint(len(block))
        out += bundle._seal(block)
    out += handles.ljust(40, b"\0") + struct.pack("<Q", bundle.MAGIC)
    index_file(prefix).write_bytes(out)


def test_several_shards_are_read(prefix: Path) -> None:
    expected = SMALL["a/kernel"]
    edit_entries(prefix, shard=1)
    with_header(prefix, protobuf.integer(1, 2))
    data_file(prefix).rename(data_file(prefix, 1, 2))
    data_file(prefix, 0, 2).write_bytes(b"")
    assert (Reader(prefix).read("a/kernel") == expected).all()
    data_file(prefix, 0, 2).unlink()
    with pytest.raises(UserError, match="data-00000-of-00002 is missing"):
        Reader(prefix)


def read_all(prefix: Path) -> None:
    reader = Reader(prefix)
    for name in reader.entries:
        reader.read(name)


def test_index_cut_off_anywhere_is_one_error(prefix: Path) -> None:
    whole = index_file(prefix).read_bytes()
    for size in range(len(whole)):
        index_file(prefix).write_bytes(whole[:size])
        with pytest.raises(UserError, match="truncated or damaged"):
            read_all(prefix)


@pytest.mark.parametrize("file", [index_file, data_file])
def test_no_flipped_bit_goes_unnoticed(file: object, prefix: Path) -> None:
    path = file(prefix)  # type: ignore[operator]
    whole = path.read_bytes()
    unnoticed = []
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        try:
            read_all(prefix)
            unnoticed.append(at)
        except UserError as error:
            assert prefix.name in str(error)
    # Only the zeros that fill up the table's footer mean nothing, and the handle of the empty
    # meta block, which nobody opens.
    footer = len(whole) - bundle.FOOTER_SIZE
    meta = footer - 2 * (bundle.TRAILER_SIZE + 8) - 20
    assert all(meta < at < len(whole) - 8 for at in unnoticed)
    assert file is index_file or not unnoticed


BROKEN = {
    "no index": (lambda p: index_file(p).unlink(), "index does not exist"),
    "format V1": (
        lambda p: (index_file(p).unlink(), p.write_bytes(b"old")),
        "checkpoint of format V1",
    ),
    "no data": (lambda p: data_file(p).unlink(), "data-00000-of-00001 is missing"),
    "data cut off": (
        lambda p: data_file(p).write_bytes(data_file(p).read_bytes()[:-1]),
        "has 39 bytes where bert_model.ckpt.index needs 40",
    ),
    "big-endian": (lambda p: with_header(p, protobuf.integer(2, 1)), "big-endian"),
    "strings": (lambda p: edit_entries(p, dtype=7), "TensorFlow type 7"),
    "shape and size disagree": (lambda p: edit_entries(p, shape=(5,)), "bytes for shape"),
    "not a table": (lambda p: index_file(p).write_bytes(b"x" * 99), "not the index"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_cannot_be_read_is_said(what: str, prefix: Path) -> None:
    spoil, message = BROKEN[what]
    spoil(prefix)
    with pytest.raises(UserError, match=message):
        read_all(prefix)


def test_partitioned_variable_is_refused(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = bundle._encode
    slices = protobuf.message(7, protobuf.integer(1, 1))
    monkeypatch.setattr(bundle, "_encode", lambda entry: encode(entry) + slices)
    edit_entries(prefix)
    with pytest.raises(UserError, match="partitioned variable"):
        read_all(prefix)


def test_checksums_are_stored_masked() -> None:
    """A value of LevelDB's own tests: the masked form differs, and masking is not idempotent."""
    assert mask(0) == 0xA282EAD8
    assert mask(mask(0)) != mask(0)
