"""The format of a corpus on disk, which docs/shard-format.md describes, and its reader, `Corpus`.

A corpus is a directory of shards, a copy of its vocabulary, and corpus.json, which is written last.
A shard is one file: a header, then tokens, sentence ends and document ends as little-endian arrays,
mapped and never loaded. The top bit of a token is its word mark (text/words.py). This module has
the layout, and writes and maps shards; corpus.json is written by build/corpus_manifest.py.

Guarantees: `Corpus` compares corpus.json with its checksum and vocab.txt with its SHA-256, and
checks size, header and last table entries of every shard before it maps that shard, because reading
a map of a truncated file kills the process (SIGBUS), where an error can name the file. What is in
between is checked when it is first used (verification.py). Rejected: one index file for all shards
(a writer could not publish shards one by one), 64-bit offsets (a shard is cut long before 2^32
tokens), Arrow (rows take 8 bytes per offset and a copy).
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from clue_ds import files
from clue_ds.errors import UserError

FORMAT_VERSION = 1
MANIFEST = "corpus.json"
VOCAB_FILE = "vocab.txt"
# Checksums of the pieces of all shards (verification.py); earlier versions did not write it.
CHECKSUMS = "checksums.bin"
STATE_DIRECTORY = ".building"
# A corpus inside the corpus: the documents that `clue-ds shard --held-out` set aside.
HELD_OUT = "held_out"
REPORT = "report"

MAGIC = b"CLUE-DS\x01"
# magic, token bytes, number of tokens, sentences, documents; all integers little-endian u64.
_HEADER = struct.Struct("<8sQQQQ")
HEADER_BYTES = 64
ALIGNMENT = 64
# Ids of at most 15 bits leave room for the word mark in 16 (text/words.py).
MAX_SMALL_VOCAB = 1 << 15
# All keys of a corpus.json that was written before it had a checksum.
_KEYS_WITHOUT_CHECKSUM = frozenset(
    "format version vocab_sha256 vocab_size token_bytes max_token_id options num_tokens "
    "num_sentences num_documents statistics shards fingerprint counts samples rejected_examples "
    "shard_bytes inputs".split()
)


class ShardArrays(NamedTuple):
    """The contents of one shard."""

    tokens: np.ndarray  # uint16 or uint32 [tokens]: id, with the word mark in the top bit
    sentence_ends: np.ndarray  # uint32 [sentences]: tokens before the end of each sentence
    document_ends: np.ndarray  # uint32 [documents]: sentences before the end of each document


class ShardFile(NamedTuple):
    """A shard's file, mapped."""

    path: Path
    data: mmap.mmap
    first_token: int  # byte offset of the tokens
    arrays: ShardArrays

    def read_tables(self) -> tuple[np.ndarray, np.ndarray]:
        """Sentence ends and document ends, read from the file.

        A table is read from start to end, and a map that is advised for random access does not read
        ahead; besides, pages of the map would stay in the process's memory.
        """
        tokens, *tables = self.arrays
        counts = [len(table) for table in tables]
        offsets = _layout(tokens.itemsize, len(tokens), *counts)[1:3]
        sentences, documents = (
            np.fromfile(self.path, "<u4", count, offset=offset)
            for count, offset in zip(counts, offsets, strict=True)
        )
        return sentences, documents


class Digest(Protocol):
    """What can be made of a shard's bytes while they are written."""

    def update(self, data: memoryview, /) -> object:
        """Take the next bytes."""


class ShardRecord(NamedTuple):
    """The entry of a shard in corpus.json."""

    file: str
    num_tokens: int
    num_sentences: int
    num_documents: int
    num_bytes: int
    sha256: str


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """How a token is stored: uint16 where the vocabulary leaves bit 15 free, else uint32."""
    return np.uint16 if vocab_size <= MAX_SMALL_VOCAB else np.uint32


def continues_bit(dtype: type[np.uint16] | type[np.uint32]) -> int:
    """The top bit: this token continues the word that the token before it belongs to."""
    return 1 << (8 * np.dtype(dtype).itemsize - 1)


def shard_name(index: int) -> str:
    return f"shard-{index:06d}.bin"


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _layout(
    token_bytes: int, num_tokens: int, num_sentences: int, num_documents: int
) -> tuple[int, int, int, int]:
    """Offsets of tokens, sentence ends and document ends, and the size of the file."""
    sentences = _aligned(HEADER_BYTES + token_bytes * num_tokens)
    documents = _aligned(sentences + 4 * num_sentences)
    return HEADER_BYTES, sentences, documents, documents + 4 * num_documents


def shard_header(
    token_bytes: int, num_tokens: int, num_sentences: int, num_documents: int
) -> tuple[bytes, int]:
    """The first HEADER_BYTES of a shard with these counts, and the size of its file."""
    header = _HEADER.pack(MAGIC, token_bytes, num_tokens, num_sentences, num_documents)
    size = _layout(token_bytes, num_tokens, num_sentences, num_documents)[3]
    return header.ljust(HEADER_BYTES, b"\0"), size


def write_shard(path: Path, arrays: ShardArrays, digest: Digest | None = None) -> ShardRecord:
    """Write a shard under a temporary name, sync it, and rename it; `digest` gets all its bytes."""
    token_bytes = arrays.tokens.dtype.itemsize
    counts = (len(arrays.tokens), len(arrays.sentence_ends), len(arrays.document_ends))
    assert counts[0] < 1 << 32, "a shard holds fewer than 2^32 tokens"
    header, _ = shard_header(token_bytes, *counts)
    layout = _layout(token_bytes, *counts)
    sections = (
        (0, memoryview(header)),
        (layout[0], _little_endian(arrays.tokens, f"<u{token_bytes}")),
        (layout[1], _little_endian(arrays.sentence_ends, "<u4")),
        (layout[2], _little_endian(arrays.document_ends, "<u4")),
    )
    sha256 = hashlib.sha256()
    digests: list[Digest] = [sha256] if digest is None else [sha256, digest]
    written = 0
    with files.writing(path) as file:
        for offset, data in sections:
            for block in (memoryview(bytes(offset - written)), data):  # padding, then the section
                file.write(block)
                for one in digests:
                    one.update(block)
            written = offset + data.nbytes
    assert written == layout[3]
    return ShardRecord(path.name, *counts, written, sha256.hexdigest())


def _little_endian(array: np.ndarray, dtype: str) -> memoryview:
    return np.ascontiguousarray(array, dtype=dtype).data.cast("B")


def map_shard(path: Path, random_access: bool = False) -> ShardFile:
    """Map a shard that is known to be whole.

    The header is read from the file, so that no page of the map is touched: those of 2,000 headers
    would take 20 MB.
    """
    with open(path, "rb", buffering=0) as file:
        _, token_bytes, *counts = _HEADER.unpack(file.read(_HEADER.size))
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if random_access:
        data.madvise(mmap.MADV_RANDOM)
    tokens, sentences, documents, _ = _layout(token_bytes, *counts)
    arrays = ShardArrays(
        np.frombuffer(data, f"<u{token_bytes}", counts[0], tokens),
        np.frombuffer(data, "<u4", counts[1], sentences),
        np.frombuffer(data, "<u4", counts[2], documents),
    )
    return ShardFile(path, data, tokens, arrays)


def fingerprint(manifest: dict[str, Any]) -> str:
    """SHA-256 of everything in a manifest that decides what samples of the corpus contain."""
    content = {
        "version": manifest["version"],
        "vocab_sha256": manifest["vocab_sha256"],
        "shards": [shard["sha256"] for shard in manifest["shards"]],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def manifest_checksum(manifest: dict[str, Any]) -> str:
    """SHA-256 of everything in corpus.json except the checksum itself."""
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class Corpus:
    """A corpus directory, opened for reading: sizes and headers checked, shards mapped.

    Raises a UserError that names the file when one is missing, cut off or of another format.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._manifest = _read_manifest(self.directory)
        self.manifest_file = self.directory / MANIFEST
        self.vocab_file = self.directory / VOCAB_FILE
        try:
            self.vocab_sha256: str = self._manifest["vocab_sha256"]
            self.vocab_size: int = self._manifest["vocab_size"]
            self.num_tokens: int = self._manifest["num_tokens"]
            self.num_sentences: int = self._manifest["num_sentences"]
            self.num_documents: int = self._manifest["num_documents"]
            self.fingerprint: str = self._manifest["fingerprint"]
            self.options: dict[str, Any] = self._manifest["options"]
            self.lower_case: bool = self.options["lower_case"]
            self._token_bytes: int = self._manifest["token_bytes"]
            self.records = [ShardRecord(**record) for record in self._manifest["shards"]]
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{self.manifest_file} is damaged ({error}); copy the corpus again"
            ) from None
        self._check_numbers()
        self._check_vocab()
        self.num_bytes = sum(record.num_bytes for record in self.records)
        # The kernel's read-ahead makes random samples from a cold disk ten times slower (1,500 per
        # second instead of 15,000), so maps of a corpus that memory can't hold are advised.
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        self._exceeds_memory = self.num_bytes > memory // 2
        self.files = [self._open(record) for record in self.records]
        self.shards = [file.arrays for file in self.files]
        self.token_dtype = np.dtype(f"<u{self._token_bytes}")

    def verify(self) -> None:
        """Compare the SHA-256 of every shard; a UserError names all files that differ."""
        bad = []
        for record in self.records:
            if files.sha256(self.directory / record.file) != record.sha256:
                bad.append(record.file)
        if bad:
            raise UserError(
                f"corpus {self.directory} is damaged: {', '.join(bad)} changed since it was "
                "written; copy it again or run `clue-ds shard` again with --force"
            )

    def _check_numbers(self) -> None:
        """Compare numbers that follow from others, for a corpus.json that has no checksum."""
        sums = (self.num_tokens, self.num_sentences, self.num_documents)
        found = (
            sum(record.num_tokens for record in self.records),
            sum(record.num_sentences for record in self.records),
            sum(record.num_documents for record in self.records),
        )
        largest = self._manifest.get("max_token_id", 0)
        if (
            sums != found
            or largest >= self.vocab_size
            or self.fingerprint != fingerprint(self._manifest)
            or self._token_bytes != token_dtype(self.vocab_size)(0).nbytes
        ):
            raise _damaged_manifest(self.directory)

    def _check_vocab(self) -> None:
        if not self.vocab_file.is_file():
            raise UserError(f"corpus {self.directory} lacks its {VOCAB_FILE}; copy it again")
        if files.sha256(self.vocab_file) != self.vocab_sha256:
            raise UserError(
                f"{self.vocab_file} is not the vocabulary that corpus {self.directory} was made "
                "with: ids would mean other tokens. Copy the corpus again, or make it again with "
                "`clue-ds shard`"
            )

    def _open(self, record: ShardRecord) -> ShardFile:
        path = self.directory / record.file
        if not path.is_file():
            raise UserError(f"corpus {self.directory} lacks {record.file}; copy it again")
        size = path.stat().st_size
        if size != record.num_bytes:
            raise UserError(
                f"{path} has {size:,} bytes where {MANIFEST} says {record.num_bytes:,}; it was cut "
                "off or changed. Copy the corpus again"
            )
        counts = record[1:4]
        header, expected_size = shard_header(self._token_bytes, *counts)
        # A file that is cut off just now has fewer bytes here, and so other ones.
        with open(path, "rb", buffering=0) as file:
            if file.read(HEADER_BYTES) != header or expected_size != size:
                raise UserError(
                    f"{path} does not have the header that {MANIFEST} describes; copy it again"
                )
            _, sentences, _, end = _layout(self._token_bytes, *counts)
            for behind, expected in ((sentences + 4 * counts[1], counts[0]), (end, counts[1])):
                if os.pread(file.fileno(), 4, behind - 4) != expected.to_bytes(4, "little"):
                    raise UserError(
                        f"{path} is damaged: the 4 bytes before byte {behind:,} are not "
                        f"{expected:,}, the last end; copy it again"
                    )
        return map_shard(path, random_access=self._exceeds_memory)


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    if not path.is_file():
        if (directory / STATE_DIRECTORY).is_dir():
            raise UserError(
                f"corpus {directory} is not finished; run the same `clue-ds shard` command again "
                "and it resumes where it stopped"
            )
        what = f"is not a corpus: it has no {MANIFEST}" if directory.is_dir() else "does not exist"
        raise UserError(f"{directory} {what}; make one with `clue-ds shard`")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); copy the corpus again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != "clue_ds corpus":
        raise UserError(f"{path} does not describe a corpus of clue_ds; choose another directory")
    if manifest.get("version") != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {manifest.get('version')}, and this clue_ds reads "
            f"version {FORMAT_VERSION}; make the corpus again, or use the clue_ds that wrote it"
        )
    # A damaged key "checksum" is a key that no corpus.json without a checksum has.
    is_whole = (
        manifest["checksum"] == manifest_checksum(manifest)
        if "checksum" in manifest
        else manifest.keys() <= _KEYS_WITHOUT_CHECKSUM
    )
    if not is_whole:
        raise _damaged_manifest(directory)
    return manifest


def _damaged_manifest(directory: Path) -> UserError:
    return UserError(
        f"corpus {directory} is damaged: {MANIFEST} changed since it was written; copy it again or "
        "run `clue-ds shard` again with --force"
    )
