"""`clue-ds bench cold`: samples per second from a corpus that is on the disk only, by order.

It writes a corpus of random ids, drops it from the page cache before each contender, and lets each
make batches through the Loader for some seconds. The contenders are the lanes order, and the same
samples in shuffled order: with the map advised that reads are random (as `Corpus` does for a corpus
larger than half of the memory), and with the kernel's read-ahead, as a plain memory map has it.
Resident memory is the process's maximum during a contender minus what it had before. The three take
turns.
"""

from __future__ import annotations

import mmap
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from clue_ds.benchmarks.description import write_results
from clue_ds.benchmarks.synthetic import write_corpus
from clue_ds.data import Corpus, Loader, SampleStream
from clue_ds.errors import UserError

CONTENDERS = ("lanes", "random reads, advised", "random reads, kernel's read-ahead")


def cold(
    output: Path | None = None,
    directory: Path | None = None,
    gigabytes: float = 8.0,
    seconds: float = 12.0,
    rounds: int = 2,
    seq_length: int = 128,
    batch_size: int = 256,
) -> None:
    """Compare the lanes order with random reads on a corpus that is not in memory.

    Args:
        output: JSON file for the figures, with device, versions and command
        directory: on the disk to measure; the corpus is written there and deleted at the end
        gigabytes: size of the corpus
        seconds: how long each contender reads in each round
        rounds: how often they take turns
        seq_length: tokens per sequence
        batch_size: sequences per batch
    """
    if directory is not None and not directory.is_dir():
        raise UserError(f"--directory {directory} is not a directory; make it, or name another")
    place = Path(tempfile.mkdtemp(dir=directory))
    previous = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if shutil.disk_usage(place).free < gigabytes * 1.1e9:
            raise UserError(f"{place} has less than {gigabytes} GB free; choose a --directory")
        write_corpus(place / "corpus", int(gigabytes * 1e9 / 2), num_shards=16, holes="nothing")
        figures = _measure(place / "corpus", seconds, rounds, seq_length, batch_size)
    finally:
        torch.set_num_threads(previous)
        shutil.rmtree(place)
    _print(figures)
    if output is not None:
        write_results(output, figures)


def drop_from_cache(corpus: Corpus) -> None:
    """Drop a corpus's pages from the map and from the page cache, which doesn't need root."""
    for file in corpus.files:
        file.data.madvise(mmap.MADV_DONTNEED)
        descriptor = os.open(file.path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def resident_bytes() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * mmap.PAGESIZE


@contextmanager
def _batches(contender: str, stream: SampleStream) -> Iterator[Iterator[Any]]:
    """An endless iterator over the contender's batches, beginning a third into the first epoch."""
    start = stream.steps_per_epoch // 3
    with Loader(stream, start_step=start) as loader:
        yield loader


def _measure(
    directory: Path, seconds: float, rounds: int, seq_length: int, batch_size: int
) -> dict[str, Any]:
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    expected: dict[str, torch.Tensor] = {}
    for _ in range(rounds):
        for name in CONTENDERS:
            corpus = Corpus(directory)
            advice = mmap.MADV_NORMAL if "read-ahead" in name else mmap.MADV_RANDOM
            for file in corpus.files:
                file.data.madvise(advice)
            order = "lanes" if name == "lanes" else "shuffle"
            stream = SampleStream(corpus, seq_length, batch_size, seed=0, order=order)
            stream.batch(0)  # so that compiled code is loaded before the clock starts
            drop_from_cache(corpus)
            row, first = _run(name, stream, seconds)
            rows[name].append(row)
            # The first batch, read from the disk, is the same in every round.
            assert torch.equal(expected.setdefault(name, first), first)
    figures = {
        name: {key: statistics.median(row[key] for row in runs) for key in runs[0]}
        for name, runs in rows.items()
    }
    return {
        "benchmark": "cold",
        "gigabytes": round(sum(file.path.stat().st_size for file in corpus.files) / 1e9, 2),
        "seq_length": seq_length,
        "batch_size": batch_size,
        "seconds_each": seconds,
        "rounds": rounds,
        "contenders": figures,
        "ratios": {
            f"lanes / {name}": round(
                figures["lanes"]["samples_per_second"] / figures[name]["samples_per_second"], 1
            )
            for name in CONTENDERS[1:]
        },
    }


def _run(name: str, stream: SampleStream, seconds: float) -> tuple[dict[str, float], torch.Tensor]:
    before = resident_bytes()
    largest, num_batches = before, 0
    begin = time.perf_counter()
    with _batches(name, stream) as batches:
        first = next(batches)["input_ids"].clone()
        first_after = time.perf_counter() - begin
        read_before = _bytes_from_disk()
        begin = time.perf_counter()
        while (elapsed := time.perf_counter() - begin) < seconds:
            next(batches)
            num_batches += 1
            if num_batches % 50 == 0:
                largest = max(largest, resident_bytes())
        read = _bytes_from_disk() - read_before
        largest = max(largest, resident_bytes())
    num_samples = num_batches * stream.global_batch_size
    return {
        "samples_per_second": round(num_samples / elapsed),
        "first_batch_milliseconds": round(1e3 * first_after, 1),
        "megabytes_per_second_from_disk": round(read / elapsed / 1e6, 1),
        "resident_megabytes_more": round((largest - before) / 1e6, 1),
    }, first


def _bytes_from_disk() -> int:
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    raise AssertionError("/proc/self/io has no read_bytes")


def _print(figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"{figures['gigabytes']} GB, not in memory; {figures['seq_length']} tokens a sample"
    table = Table("contender", "samples/s", "first batch, ms", "MB/s", "MB resident", title=title)
    for name, row in figures["contenders"].items():
        table.add_row(
            name,
            f"{row['samples_per_second']:,.0f}",
            f"{row['first_batch_milliseconds']:,.0f}",
            f"{row['megabytes_per_second_from_disk']:,.0f}",
            f"{row['resident_megabytes_more']:,.0f}",
        )
    console = Console()
    console.print(table)
    for name, ratio in figures["ratios"].items():
        console.print(f"{name}: {ratio}")
