"""`clue-ds bench scale`: the seconds and the memory that it takes to open a corpus of 100 GB.

It writes a sparse corpus of 50 G tokens (holes take no disk space and read as zeros) and opens it
in a fresh process for each order. It measures the time of `Corpus` and `SampleStream`, of the first
batch and of later ones, and the memory of the process. The first process may have to compile code
that is not in numba's cache; the medians leave that out. What it can't measure is the disk: see
`clue-ds bench cold`.

Kinds of samples that follow sentence and document ends need real ones, so they get a corpus a tenth
as large of which only the tokens are holes. Its first start makes an index; later ones map it.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from clue_ds.benchmarks.description import write_results
from clue_ds.benchmarks.synthetic import write_corpus
from clue_ds.data import Corpus


def scale(
    output: Path | None = None,
    directory: Path | None = None,
    gigatokens: float = 50.0,
    shards: int = 2000,
    seq_length: int = 128,
    batch_size: int = 256,
    rounds: int = 3,
) -> None:
    """Open a sparse corpus of 50 G tokens (100 GB) and make batches from its middle.

    Args:
        output: JSON file for the figures, with device, versions and command
        directory: where the sparse files are made and deleted again
        gigatokens: tokens of the corpus, in 10^9
        shards: number of shards; at 128 MB of text per shard, 300 GB of text have some 2,000
        seq_length: tokens per sequence
        batch_size: sequences per batch
        rounds: fresh processes for each order; the figures are their medians
    """
    with tempfile.TemporaryDirectory(dir=directory) as temporary:
        place = Path(temporary) / "corpus"
        num_tokens = int(gigatokens * 1e9)
        write_corpus(place, num_tokens, shards, holes="everything")
        rows: dict[str, list[dict[str, float]]] = {"shuffle": [], "lanes": []}
        for _ in range(rounds):
            for order, row in rows.items():
                row.append(_fresh_process(place, order, seq_length, batch_size, "windows"))
        shutil.rmtree(place)
        write_corpus(place, num_tokens // 10, max(1, shards // 10), holes="tokens")
        num_sentences = Corpus(place).num_sentences
        starts = {
            kind: _starts(place, rounds, seq_length, batch_size, kind)
            for kind in ("sentences", "documents", "packed", "nsp")
        }
    figures = {
        "benchmark": "scale",
        "num_tokens": num_tokens,
        "num_shards": shards,
        "seq_length": seq_length,
        "batch_size": batch_size,
        "rounds": rounds,
        "orders": {
            order: {key: round(statistics.median(r[key] for r in row), 4) for key in row[0]}
            for order, row in rows.items()
        },
        "kinds": {"num_tokens": num_tokens // 10, "num_sentences": num_sentences, **starts},
    }
    _print(figures)
    if output is not None:
        write_results(output, figures)


def _starts(
    place: Path, rounds: int, seq_length: int, batch_size: int, kind: str
) -> dict[str, float]:
    """Figures of a kind's first start, which makes the index, and the medians of later ones."""
    first, *later = (
        _fresh_process(place, "lanes", seq_length, batch_size, kind) for _ in range(1 + rounds)
    )
    # Resident memory is left out: pages of files that were just written are mapped 2 MB at a time.
    keys = ("open_seconds", "first_batch_milliseconds", "megabytes_anonymous")
    medians = {key: round(statistics.median(row[key] for row in later), 4) for key in keys}
    # A small corpus has none: its samples are found again in each process.
    files = [path.stat() for path in place.with_name(place.name + ".index").glob("*.bin")]
    newest = max(files, key=lambda file: file.st_mtime_ns, default=None)
    return {
        "first_open_seconds": round(first["open_seconds"], 4),
        **medians,
        "index_megabytes": 0.0 if newest is None else round(newest.st_size / 1e6, 3),
    }


def _fresh_process(
    directory: Path, order: str, seq_length: int, batch_size: int, kind: str
) -> dict[str, float]:
    """The figures of scale_probe.py, run in a new process."""
    probe = Path(__file__).with_name("scale_probe.py")
    arguments = [str(probe), str(directory), order, str(seq_length), str(batch_size), kind]
    result = subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.PIPE)
    row: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return row


def _print(figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    kinds = dict(figures["kinds"])
    for columns, num_tokens, what in (
        (figures["orders"], figures["num_tokens"], f"in {figures['num_shards']:,} shards"),
        (kinds, kinds.pop("num_tokens"), f"in {kinds.pop('num_sentences'):,} sentences"),
    ):
        table = Table("", *columns, title=f"{num_tokens:,} tokens {what}")
        for key in next(iter(columns.values())):
            table.add_row(key.replace("_", " "), *(f"{row[key]:,.3f}" for row in columns.values()))
        Console().print(table)
