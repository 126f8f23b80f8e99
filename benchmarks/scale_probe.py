"""The script that `clue-ds bench scale` runs in fresh processes: it opens a corpus, makes batches.

It imports only what a loader needs, so that its memory is that of a loader: VmRSS of the whole
process in 10^6 bytes, which includes the interpreter, numpy, numba and every page of a library or
of the corpus that was touched. Batches are numpy arrays; torch, which a training process has
anyway, is imported at the end, to show how much it adds.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

from clue_ds.data.corpus import Corpus
from clue_ds.data.sampling import Kind
from clue_ds.data.stream.sample_stream import SampleStream


def measure(
    directory: str, order: str, seq_length: int, batch_size: int, kind: Kind
) -> dict[str, float]:
    """The time that opening and batches take, and the memory of this process."""
    imported = _memory()
    begin = time.perf_counter()
    corpus = Corpus(directory)
    stream = SampleStream(corpus, seq_length, batch_size, seed=0, samples=kind, order=order)
    opened = time.perf_counter() - begin
    step = stream.steps_per_epoch // 2
    begin = time.perf_counter()
    stream.arrays(step)
    first, after = time.perf_counter() - begin, _memory()
    assert "torch" not in sys.modules
    times = []
    for later in range(step + 1, step + 201):
        begin = time.perf_counter()
        stream.arrays(later)
        times.append(time.perf_counter() - begin)
    figures = {
        "open_seconds": opened,
        "first_batch_milliseconds": 1e3 * first,
        "batch_milliseconds": 1e3 * statistics.median(times),
        "megabytes_resident_with_first_batch": after["VmRSS"],
        "megabytes_resident_after_import": imported["VmRSS"],
        "megabytes_anonymous": after["RssAnon"],
        "megabytes_resident_after_201_batches": _memory()["VmRSS"],
    }
    if kind == "windows":
        stream.batch(step)  # imports torch
        figures["megabytes_resident_with_torch_as_well"] = _memory()["VmRSS"]
    return figures


def _memory() -> dict[str, float]:
    """Memory of this process in MB: VmRSS is all of it, RssAnon what is not mapped from a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = [line.split() for line in lines if line.startswith(("VmRSS", "RssAnon"))]
    return {name.rstrip(":"): int(kilobytes) * 1024 / 1e6 for name, kilobytes, _ in fields}


if __name__ == "__main__":
    directory, order, seq_length, batch_size, kind = sys.argv[1:]
    print(json.dumps(measure(directory, order, int(seq_length), int(batch_size), kind)))  # type: ignore[arg-type]
