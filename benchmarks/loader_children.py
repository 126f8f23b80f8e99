"""The loader benchmark's peers that need an interpreter and packages of their own.

Each runs as a process that prints "ready" once its rows have been checked, and then answers every
line on its standard input with the CPU seconds of one batch. transformers 4.57 had a whole-word
collator for Chinese; mosaicml-streaming and litdata are described in streaming_child.py.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from clue_ds.data import Corpus
from clue_ds.data.text.vocab import read_vocab
from clue_ds.errors import UserError

SecondsABatch = dict[str, Callable[[int], float]]
STREAMING = ("mosaicml-streaming", "litdata")

_TRANSFORMERS4 = """
import sys, time
import numpy as np, torch
from transformers import BertTokenizer, DataCollatorForWholeWordMask
torch.set_num_threads(1)
vocab, rows, size = sys.argv[1], np.load(sys.argv[2]), int(sys.argv[3])
collate = DataCollatorForWholeWordMask(BertTokenizer(vocab), mlm_probability=0.15)
ids, refs = rows["ids"].tolist(), [np.flatnonzero(row).tolist() for row in rows["continues"]]
print("ready", flush=True)
for line in sys.stdin:
    places = np.arange(int(line) * size, (int(line) + 1) * size) % len(ids)
    begin = time.process_time()
    collate([{"input_ids": ids[i], "chinese_ref": refs[i]} for i in places])
    print(time.process_time() - begin, flush=True)
"""


@contextmanager
def transformers4(
    corpus: Corpus, seq_length: int, batch_size: int, python: Path | None
) -> Iterator[SecondsABatch]:
    """The Chinese whole-word collator of transformers 4.57, run by `python`: seconds per batch."""
    if python is None:
        yield {}
        return
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "rows.npy"
        np.save(path, _marked_rows(corpus, seq_length, 4 * batch_size))
        words = ["-c", _TRANSFORMERS4, corpus.vocab_file.resolve(), path, batch_size]
        with _child(python, "transformers 4.57", *words) as make:
            yield {"transformers 4 collator, whole word": make}


@contextmanager
def streaming(
    corpus: Corpus, seq_length: int, batch_size: int, python: Path | None
) -> Iterator[SecondsABatch]:
    """The data sets of mosaicml-streaming and litdata, run by `python`: seconds per batch."""
    if python is None:
        yield {}
        return
    script = Path(__file__).with_name("streaming_child.py")
    vocab = read_vocab(corpus.vocab_file)
    ids = [vocab.index(token) for token in ("[CLS]", "[SEP]", "[MASK]")]
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        windows = directory / "windows.npy"
        np.save(windows, _marked_rows(corpus, seq_length)["ids"][:, 1:-1].astype(np.uint16))
        made = {}
        for library in STREAMING:
            words = [script, library, windows, directory / library, batch_size, len(vocab), *ids]
            made[f"{library} + torch masking"] = stack.enter_context(
                _child(python, library, *words)
            )
        yield made


@contextmanager
def _child(python: Path, needs: str, *words: object) -> Iterator[Callable[[int], float]]:
    """A function that has a child process, run by `python`, make a batch."""
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            [str(python), *map(str, words)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        assert child.stdin is not None and child.stdout is not None
        to_child, from_child = child.stdin, child.stdout

        def make(step: int) -> float:
            print(step, file=to_child, flush=True)
            return float(from_child.readline())

        try:
            if from_child.readline() != "ready\n":
                errors.seek(0)
                last = " ".join(errors.read().splitlines()[-1:])
                raise UserError(f"{python} could not run {needs} ({last}); install it there")
            yield make
        finally:
            to_child.close()
            child.wait()


def version_of(python: Path | None, package: str) -> str | None:
    """The version of a package in another interpreter."""
    if python is None:
        return None
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.check_output([str(python), "-c", code], text=True).strip()


def _marked_rows(corpus: Corpus, seq_length: int, most: int | None = None) -> np.ndarray:
    """[CLS] window [SEP] rows with their ids and word marks, as one structured array."""
    tokens = np.concatenate([shard.tokens for shard in corpus.shards])
    window = seq_length - 2
    num = len(tokens) // window if most is None else min(most, len(tokens) // window)
    bit = 1 << (8 * tokens.dtype.itemsize - 1)
    vocab = read_vocab(corpus.vocab_file)
    rows = np.zeros((num, seq_length), dtype=[("ids", "<i4"), ("continues", "?")])
    windows = tokens[: num * window].reshape(num, window)
    rows["ids"][:, 1:-1] = windows & (bit - 1)
    rows["continues"][:, 1:-1] = windows & bit != 0
    rows["ids"][:, 0], rows["ids"][:, -1] = vocab.index("[CLS]"), vocab.index("[SEP]")
    return rows
