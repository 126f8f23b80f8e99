"""mosaicml-streaming and litdata in an interpreter of their own: CPU seconds of each batch.

mosaicml-streaming imports torchvision, which has no build for some versions of torch and is not
used for tokens, so an empty module replaces it. Each library writes the windows in its own format,
as its documentation shows for tokens, and reads them shuffled, in this process: a worker process
would double the work. Rows then get [CLS] and [SEP], and are stacked and masked like those of the
other torch peers.

Run by its path, with LIBRARY WINDOWS.npy DIRECTORY BATCH_SIZE VOCAB_SIZE CLS SEP MASK. Each line on
standard input is answered with the CPU seconds of one batch.
"""

from __future__ import annotations

import importlib
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch


def stand_in_for_torchvision() -> None:
    """Define the names of torchvision that mosaicml-streaming uses while it is imported."""
    names = ("", ".datasets", ".transforms", ".transforms.functional")
    modules = {f"torchvision{name}": types.ModuleType(f"torchvision{name}") for name in names}
    modules["torchvision.datasets"].__dict__.update(VisionDataset=object, CIFAR10=object)
    modules["torchvision.transforms.functional"].__dict__["to_tensor"] = None
    sys.modules.update(modules)


def mosaic(windows: np.ndarray, batch_size: int, directory: str) -> Iterator[Any]:
    """Rows of its own format (MDS), shuffled, without end."""
    # This module looks for the real torchvision, so it is imported first.
    importlib.import_module("transformers.feature_extraction_utils")
    stand_in_for_torchvision()
    from streaming import MDSWriter, StreamingDataset

    columns = {"tokens": f"ndarray:uint16:{windows.shape[1]}"}
    with MDSWriter(out=directory, columns=columns) as writer:
        for window in windows:
            writer.write({"tokens": window})
    rows = StreamingDataset(local=directory, shuffle=True, batch_size=batch_size)
    while True:
        for row in rows:
            yield row["tokens"]


def litdata(windows: np.ndarray, batch_size: int, directory: str) -> Iterator[Any]:
    """Rows of its format for tokens, shuffled, without end."""
    from litdata import StreamingDataset, TokensLoader
    from litdata.streaming.writer import BinaryWriter

    width = windows.shape[1]
    writer = BinaryWriter(directory, chunk_size=width * 4096, item_loader=TokensLoader(width))
    for index, window in enumerate(windows):
        writer[index] = torch.from_numpy(window.astype(np.int32))
    writer.done()
    writer.merge()
    rows = StreamingDataset(directory, item_loader=TokensLoader(width), shuffle=True)
    while True:
        yield from rows


LIBRARIES = {"mosaicml-streaming": mosaic, "litdata": litdata}


def main(library: str, path: str, directory: str, *numbers: str) -> None:
    """Check that the rows of a batch are windows, then answer each line with a time."""
    sys.path.insert(0, str(Path(__file__).parent))
    from torch_masking import mask_in_torch

    batch_size, vocab_size, cls_id, sep_id, mask_id = map(int, numbers)
    windows = np.load(path)
    rows = LIBRARIES[library](windows, batch_size, directory)

    def take() -> torch.Tensor:
        batch = torch.empty(batch_size, windows.shape[1] + 2, dtype=torch.int64)
        batch[:, 0], batch[:, -1] = cls_id, sep_id
        for i in range(batch_size):
            batch[i, 1:-1] = torch.as_tensor(next(rows))
        return batch

    known = {window.astype(np.int64).tobytes() for window in windows}
    seen = [row[1:-1].numpy().tobytes() for row in take()]
    assert set(seen) <= known, f"{library} returned rows that are not windows"
    print("ready", flush=True)
    for _ in sys.stdin:
        begin = time.process_time()
        mask_in_torch(take(), vocab_size, mask_id)
        print(time.process_time() - begin, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
