"""Mutated model files: each is read, or refused by one UserError, and nothing is written then.

CLUE_DS_FUZZ sets the number of inputs (default 100). `CLUE_DS_FUZZ=5000 pytest -n 0
tests/test_fuzz_models.py` takes some minutes.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import TINY_CONFIG, random_model, write_vocab

from clue_ds import export
from clue_ds.errors import UserError
from clue_ds.export import archives, sources
from clue_ds.vocab_file import find, vocab_lines

# Share of each kind of input.
KINDS = {
    "vocab.txt": 0.15,
    "tokenizer.json": 0.15,
    "config.json": 0.2,
    "tokenizer_config.json": 0.1,
    "model.safetensors": 0.15,
    "pytorch_model.bin": 0.15,
    "model.zip": 0.1,
}
NUM_INPUTS = int(os.environ.get("CLUE_DS_FUZZ", "100"))

# What is written over, inserted into or cut out of a file.
SPLICES = st.one_of(
    st.binary(max_size=8),
    st.sampled_from([b"\n", b"\r", b" ", b"\0", b"\xef\xbb\xbf", b'"', b"{", b"1e999", b"[MASK]"]),
)
# (position as a share of the file, bytes removed there, bytes put there)
BYTE_EDITS = st.lists(
    st.tuples(st.floats(0, 1), st.sampled_from([0, 1, 2, 8, 10**9]), SPLICES),
    min_size=1,
    max_size=4,
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["bert", "gelu", "[MASK]", 0, 1, 24, 30, 1 << 24]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
# (which of the object's places, the new value)
JSON_EDITS = st.lists(st.tuples(st.floats(0, 1), VALUES), min_size=1, max_size=3)


def spliced(content: bytes, edits: list[tuple[float, int, bytes]]) -> bytes:
    for share, num_removed, put in edits:
        at = int(share * len(content))
        content = content[:at] + put + content[at + num_removed :]
    return content


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside a JSON value."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def edited(content: bytes, edits: list[tuple[float, Any]]) -> bytes:
    values = json.loads(content)
    for share, new in edits:
        known = list(places(values))
        if not known:
            break
        *path, last = known[min(int(share * len(known)), len(known) - 1)]
        inner = values
        for key in path:
            inner = inner[key]
        inner[last] = new
    return json.dumps(values).encode("utf-8", "surrogatepass")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model, and beside its files a zip of them."""
    folder = tmp_path_factory.mktemp("fuzz")
    vocab_file = write_vocab(folder / "vocab.txt", TINY_CONFIG.vocab_size)
    state = random_model(TINY_CONFIG, 0).state_dict()
    directory = export.save(TINY_CONFIG, state, vocab_file, folder / "model", legacy=True)
    packed = export.save(TINY_CONFIG, state, vocab_file, folder / "tf", to="tf")
    (packed / "bert_model.ckpt.meta").unlink()
    archives.pack(packed, directory / "model.zip")
    return directory


def check(model: Path, name: str, content: bytes, scratch: Path) -> bool:
    """Open and convert the model with this content of one file; whether it was accepted."""
    shutil.rmtree(scratch, ignore_errors=True)
    directory = scratch / "spoiled"
    directory.mkdir(parents=True)
    needed = {"config.json", "tokenizer_config.json", "model.safetensors", "vocab.txt"}
    if name == "pytorch_model.bin":
        needed.remove("model.safetensors")
    if name == "tokenizer.json":
        needed.remove("vocab.txt")
    for other in needed - {name}:
        shutil.copyfile(model / other, directory / other)
    (directory / name).write_bytes(content)
    out = scratch / "out"
    try:
        where = directory / name if name == "model.zip" else directory
        with sources.opened(where) as source:
            tokens = vocab_lines(source.vocab_file)
            export.save(*source[:3], out, lower_case=source.lower_case)
    except UserError as error:
        assert "spoiled" in str(error) or name in str(error), error
        assert len(str(error)) < 2000
        assert sorted(path.name for path in scratch.iterdir()) == ["spoiled"]
        return False
    assert export.open_model(out).config.vocab_size == len(tokens)
    assert vocab_lines(find(out)) == tokens, "ids moved"
    return True


@pytest.mark.parametrize("name", KINDS)
def test_every_mutation_is_read_or_refused(name: str, model: Path, tmp_path: Path) -> None:
    original = (model / name).read_bytes()
    contents = st.builds(spliced, st.just(original), BYTE_EDITS)
    if name.endswith(".json"):
        contents |= st.builds(edited, st.just(original), JSON_EDITS)
    if name == "model.safetensors":
        contents |= st.builds(other_header, st.just(original), JSON_EDITS)
    if name == "pytorch_model.bin":
        contents |= st.builds(spliced, st.just(as_zip(model)), BYTE_EDITS)
    counts = {True: 0, False: 0}

    @settings(
        max_examples=max(1, round(NUM_INPUTS * KINDS[name])),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(content=contents)
    def run(content: bytes) -> None:
        counts[check(model, name, content, tmp_path / "scratch")] += 1

    run()
    print(f"{name}: {counts[True]} accepted, {counts[False]} refused")
    assert check(model, name, original, tmp_path / "scratch"), "the file itself is read"


def other_header(content: bytes, edits: list[tuple[float, Any]]) -> bytes:
    """A safetensors file with another header."""
    size = int.from_bytes(content[:8], "little")
    header = edited(content[8 : 8 + size], edits)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def as_zip(model: Path) -> bytes:
    """The weights as today's torch.save writes them."""
    file = io.BytesIO()
    torch.save(safetensors.torch.load_file(model / "model.safetensors"), file)
    assert zipfile.is_zipfile(file)
    return file.getvalue()
