"""The loader benchmark's peers other than `datasets` and the collator of transformers 5.

Each makes the same thing, a masked batch of the corpus's tokens, in the way that its users do:
rows of a memory map stacked by a torch DataLoader's code path, and masking in torch on the whole
batch, as BERT masks (15 % drawn, of them 80/10/10). transformers 4.57's whole-word collator needs
that version: it runs in an interpreter of its own, which measures itself, one batch a line.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clue_ds.data import Corpus
from clue_ds.data.vocab import read_vocab

_CHILD = """
import json, sys, time
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


class MemmapRows(torch.utils.data.Dataset):
    """Windows of a map of token ids as torch tensors: the data set that people write."""

    def __init__(self, tokens: np.ndarray, seq_length: int, cls_id: int, sep_id: int) -> None:
        self.tokens, self.window = tokens, seq_length - 2
        self.cls_id, self.sep_id = cls_id, sep_id

    def __len__(self) -> int:
        return len(self.tokens) // self.window

    def __getitem__(self, index: int) -> torch.Tensor:
        row = torch.empty(self.window + 2, dtype=torch.int64)
        row[0], row[-1] = self.cls_id, self.sep_id
        begin = index * self.window
        row[1:-1] = torch.from_numpy(self.tokens[begin : begin + self.window].astype(np.int64))
        return row


def mask_in_torch(ids: torch.Tensor, vocab_size: int, mask_id: int) -> tuple[torch.Tensor, ...]:
    """BERT's masking of a batch [B, S], but of its first and last column, in whole-tensor steps."""
    labels = ids.clone()
    chosen = torch.rand(ids.shape) < 0.15
    chosen[:, 0] = chosen[:, -1] = False
    labels[~chosen] = -100
    draw = torch.rand(ids.shape)
    ids[chosen & (draw < 0.8)] = mask_id
    replaced = chosen & (draw >= 0.9)
    ids[replaced] = torch.randint(vocab_size, ids.shape)[replaced]
    return ids, labels


def torch_peers(
    corpus: Corpus, seq_length: int, batch_size: int, directory: str
) -> dict[str, Callable[[int], Any]]:
    """A torch Dataset over a memmap, and nanoGPT-style random crops."""
    bit = 1 << (8 * corpus.shards[0].tokens.dtype.itemsize - 1)
    path = Path(directory) / "ids.bin"
    with open(path, "wb") as file:
        for shard in corpus.shards:
            file.write((shard.tokens & (bit - 1)).tobytes())
    tokens = np.memmap(path, dtype=corpus.shards[0].tokens.dtype, mode="r")
    vocab = read_vocab(corpus.vocab_file)
    cls_id, sep_id, mask_id = map(vocab.index, ("[CLS]", "[SEP]", "[MASK]"))
    rows = MemmapRows(tokens, seq_length, cls_id, sep_id)
    order = np.random.default_rng(0).permutation(len(rows)).tolist()

    def dataset(step: int) -> Any:
        places = range(step * batch_size, (step + 1) * batch_size)
        batch = torch.utils.data.default_collate([rows[order[i % len(order)]] for i in places])
        return mask_in_torch(batch, len(vocab), mask_id)

    def crops(step: int) -> Any:
        begins = torch.randint(len(tokens) - seq_length, (batch_size,))
        parts = [
            torch.from_numpy(tokens[i : i + seq_length].astype(np.int64)) for i in begins.tolist()
        ]
        return mask_in_torch(torch.stack(parts), len(vocab), mask_id)

    return {
        "torch Dataset over memmap + torch masking": dataset,
        "nanoGPT-style crops + torch masking": crops,
    }


@contextmanager
def transformers4(
    corpus: Corpus, seq_length: int, batch_size: int, python: Path | None
) -> Iterator[dict[str, Callable[[int], float]]]:
    """Transformers 4.57's Chinese whole-word collator, in `python`: seconds of a batch."""
    if python is None:
        yield {}
        return
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "rows.npy"
        np.save(path, _marked_rows(corpus, seq_length, 4 * batch_size))
        arguments = [str(corpus.vocab_file.resolve()), str(path), str(batch_size)]
        child = subprocess.Popen(
            [str(python), "-c", _CHILD, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert child.stdin is not None and child.stdout is not None
        to_child, from_child = child.stdin, child.stdout

        def make(step: int) -> float:
            print(step, file=to_child, flush=True)
            return float(from_child.readline())

        try:
            assert from_child.readline() == "ready\n", f"{python} lacks transformers 4 or torch"
            yield {"transformers 4 collator, whole word": make}
        finally:
            to_child.close()
            child.wait()


def version_of(python: Path | None, package: str) -> str | None:
    """The version of a package in another interpreter."""
    if python is None:
        return None
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.check_output([str(python), "-c", code], text=True).strip()


def _marked_rows(corpus: Corpus, seq_length: int, num: int) -> np.ndarray:
    """[CLS] window [SEP] rows with their ids and word marks, as one structured array."""
    tokens = np.concatenate([shard.tokens for shard in corpus.shards])
    window = seq_length - 2
    num = min(num, len(tokens) // window)
    bit = 1 << (8 * tokens.dtype.itemsize - 1)
    vocab = read_vocab(corpus.vocab_file)
    rows = np.zeros((num, seq_length), dtype=[("ids", "<i4"), ("continues", "?")])
    windows = tokens[: num * window].reshape(num, window)
    rows["ids"][:, 1:-1] = windows & (bit - 1)
    rows["continues"][:, 1:-1] = windows & bit != 0
    rows["ids"][:, 0], rows["ids"][:, -1] = vocab.index("[CLS]"), vocab.index("[SEP]")
    return rows
