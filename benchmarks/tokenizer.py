"""`clue-ds bench tokenizer`: MB/s per core against Hugging Face `tokenizers`, on the same lines.

The peer is `encode_batch_fast` of the very tokenizer that BertTokenizer wraps, with its own threads
switched off. Both sides are measured in processor time, in turns. A turn reads the whole text once,
from first line to last, in parts of the size that `clue-ds shard` gives the tokenizer. Before each
turn other memory is written, so that no turn finds its text in the processor's cache. The first
turn also compares the ids of every line, and the benchmark ends with an error if one differs.
`bytes.decode()` and a copy of the bytes, in the same parts, show the limits.

Rejected: repeating each part before going on to the next. A part and its ids fit into the cache, so
that measured rates up to 1.5 times as high.
"""

from __future__ import annotations

import gzip
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from clue_ds.benchmarks.description import write_results
from clue_ds.data import Tokenizer
from clue_ds.errors import UserError, existing_file

# More than the cache of the processors at hand: 32 MiB.
BYTES_THAT_FILL_CACHES = 256 << 20
OURS, PEER, DECODE, COPY = "clue_ds", "tokenizers encode_batch_fast", "bytes.decode()", "memcpy"


def tokenizer(
    texts: tyro.conf.Positional[tuple[Path, ...]],
    /,
    vocab: Path,
    output: Path | None = None,
    megabytes: float = 64.0,
    part_megabytes: float = 1.0,
    repeats: int = 5,
) -> None:
    """Compare our tokenizer with encode_batch_fast of `tokenizers` on one or more texts.

    Args:
        texts: text files with one sentence per line, also as .gz; each is measured by itself
        vocab: vocab.txt of a BERT model
        output: JSON file for the figures, with device, versions and command
        megabytes: how much of each text is read, from its beginning; all of a shorter text
        part_megabytes: how much text a contender is given at a time
        repeats: turns of each contender; a turn reads the whole text once
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    existing_file(vocab, "vocabulary")
    load = round(os.getloadavg()[0], 2)
    figures = []
    for path in texts:
        data = existing_file(path, "text").read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        data = data[: data.rfind(b"\n", 0, int(megabytes * 1e6)) + 1]
        if not data:
            raise UserError(
                f"text {path} has no complete line in its first {megabytes} MB; give another text, "
                "or a larger --megabytes"
            )
        figures.append({"text": path.name, **_measure(data, vocab, part_megabytes, repeats)})
    _print(figures)
    if output is not None:
        setting = {"part_megabytes": part_megabytes, "repeats": repeats}
        setting["load_average_before"] = load
        write_results(output, {"benchmark": "tokenizer", "setting": setting, "texts": figures})


def _parts(data: bytes, part_bytes: int) -> list[bytes]:
    """The text in parts of whole lines and about `part_bytes`."""
    parts = []
    begin = 0
    while begin < len(data):
        end = data.find(b"\n", begin + part_bytes - 1) + 1 or len(data)
        parts.append(data[begin:end])
        begin = end
    return parts


def _reference(vocab: Path) -> Any:
    import shutil
    import tempfile

    from transformers import BertTokenizer

    with tempfile.TemporaryDirectory() as directory:
        shutil.copy(vocab, Path(directory) / "vocab.txt")
        reference = BertTokenizer.from_pretrained(directory, do_lower_case=True).backend_tokenizer
    reference.encode_special_tokens = True  # a [MASK] in the text is text
    return reference


def _measure(data: bytes, vocab: Path, part_megabytes: float, repeats: int) -> dict[str, Any]:
    """MB/s of each contender, median over the turns, and ratios; UserError if ids differ."""
    ours, reference = Tokenizer(vocab), _reference(vocab)

    def peer(lines: list[str]) -> Any:
        return reference.encode_batch_fast(lines, add_special_tokens=False)

    parts = _parts(data, int(part_megabytes * 1e6))
    part_lines = [part.decode().split("\n")[: part.count(b"\n")] for part in parts]
    # The compiled code and its tables, before any time is taken: a start, not a rate.
    ours.encode_marked(parts[0])
    contenders: dict[str, tuple[Callable[[Any], Any], list[Any]]] = {
        OURS: (ours.encode_marked, parts),
        PEER: (peer, part_lines),
        DECODE: (bytes.decode, parts),
        COPY: (bytearray, parts),
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    other = np.zeros(BYTES_THAT_FILL_CACHES, dtype=np.uint8)
    for turn in range(repeats):
        for name, (function, arguments) in contenders.items():
            other += 1
            seconds = 0.0
            for part, argument in zip(parts, arguments, strict=True):
                begin = time.process_time()
                result = function(argument)
                seconds += time.process_time() - begin
                if turn == 0 and name == PEER:
                    _check_ids(result, ours.encode_lines(part)[0])
            rates[name].append(len(data) / 1e6 / max(seconds, 1e-9))
    medians = {name: round(float(np.median(values)), 2) for name, values in rates.items()}
    ratios = [a / b for a, b in zip(rates[OURS], rates[PEER], strict=True)]
    ascii_letters = sum(map(data.count, (bytes([c]) for c in range(65, 123) if chr(c).isalpha())))
    return {
        "megabytes": round(len(data) / 1e6, 2),
        "num_lines": sum(map(len, part_lines)),
        "lines_that_differ": 0,
        "latin_share_of_bytes": round(ascii_letters / len(data), 3),
        "megabytes_per_second_per_core": medians,
        "ratio_to_peer": round(float(np.median(ratios)), 1),
        "ratio_p20": round(float(np.percentile(ratios, 20)), 1),
        "ratio_p80": round(float(np.percentile(ratios, 80)), 1),
    }


def _check_ids(encodings: Any, ids: np.ndarray) -> None:
    """UserError unless the peer's encodings of some lines have these ids, int32 [tokens]."""
    theirs = np.fromiter((i for encoding in encodings for i in encoding.ids), dtype=np.int32)
    if not np.array_equal(theirs, ids):
        raise UserError("the two tokenizers give different ids for this text; please report it")


def _print(figures: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    names = list(figures[0]["megabytes_per_second_per_core"])
    table = Table("text", "Latin", *names, "ratio", title="MB/s per core; no line differs")
    for row in figures:
        rates = row["megabytes_per_second_per_core"]
        table.add_row(
            row["text"],
            f"{row['latin_share_of_bytes']:.0%}",
            *(f"{rates[name]:,.1f}" for name in names),
            f"{row['ratio_to_peer']:.0f}x",
        )
    Console().print(table)
