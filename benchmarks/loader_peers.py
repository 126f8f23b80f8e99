"""The loader benchmark's peers in plain torch.

Each makes a masked batch of the corpus's tokens as its users do: rows of a memory map, stacked, and
masked in torch on the whole batch as in BERT (15% of the tokens, of them 80/10/10). The Dataset's
rows are stacked by the function that a torch DataLoader uses.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clue_ds.benchmarks.torch_masking import mask_in_torch
from clue_ds.data import Corpus
from clue_ds.data.text.vocab import read_vocab


class MemmapRows(torch.utils.data.Dataset):
    """Windows of a memory map of token ids as torch tensors: the data set that people write."""

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
        windows = [
            torch.from_numpy(tokens[i : i + seq_length].astype(np.int64)) for i in begins.tolist()
        ]
        return mask_in_torch(torch.stack(windows), len(vocab), mask_id)

    return {
        "torch Dataset over memmap + torch masking": dataset,
        "nanoGPT-style crops + torch masking": crops,
    }
