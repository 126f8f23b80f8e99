"""`clue-ds bench tokenizer`: MB/s of one core against Hugging Face `tokenizers`, on the same lines.

The peer is `encode_batch_fast` of the very tokenizer that BertTokenizer wraps, with threads of its
own switched off. Both sides take turns part by part, so that what else the machine does hits both,
and both are measured in processor time. The ids of every line are compared first: a figure for
other tokens would be worth nothing. `bytes.decode()` and a copy of the bytes are the limits.
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

from clue_ds.benchmarks.environment import write_results
from clue_ds.data import Tokenizer
from clue_ds.errors import UserError, existing_file

OURS, PEER, DECODE, COPY = "clue_ds", "tokenizers encode_batch_fast", "bytes.decode()", "memcpy"


def tokenizer(
    texts: tyro.conf.Positional[tuple[Path, ...]],
    /,
    vocab: Path,
    output: Path | None = None,
    megabytes: float = 8.0,
    part_megabytes: float = 0.5,
    repeats: int = 8,
) -> None:
    """Compare our tokenizer with tokenizers' encode_batch_fast on each of some texts.

    Args:
        texts: text files, one sentence a line, perhaps .gz; each is a figure of its own
        vocab: vocab.txt of a BERT model
        output: JSON file for the figures, with device, versions and command
        megabytes: how much of each text is used, from its beginning
        part_megabytes: what a contender does before the next one's turn
        repeats: turns of ours, a copy and a decode for each turn of the peer, which is slow
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    existing_file(vocab, "vocabulary")
    figures = []
    for path in texts:
        data = existing_file(path, "text").read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        data = data[: data.rfind(b"\n", 0, int(megabytes * 1e6)) + 1]
        if not data:
            raise UserError(f"text {path} has no whole line in its first {megabytes} MB")
        figures.append({"text": path.name, **_measure(data, vocab, part_megabytes, repeats)})
    _print(figures)
    if output is not None:
        write_results(output, {"benchmark": "tokenizer", "texts": figures})


def _parts(data: bytes, part_bytes: int) -> list[bytes]:
    """Whole lines, of some `part_bytes` together."""
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
    reference.encode_special_tokens = True  # a [MASK] that is spelled out is text
    return reference


def _measure(data: bytes, vocab: Path, part_megabytes: float, repeats: int) -> dict[str, Any]:
    """MB/s of each contender, median over the parts, and ratios; UserError if ids differ."""
    ours, reference = Tokenizer(vocab), _reference(vocab)

    def peer(lines: list[str]) -> Any:
        return reference.encode_batch_fast(lines, add_special_tokens=False)

    contenders: dict[str, tuple[Callable[[Any], Any], int]] = {
        OURS: (ours.encode_marked, repeats),
        DECODE: (bytes.decode, repeats),
        COPY: (bytearray, repeats),
        PEER: (peer, 1),
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    num_lines = 0
    for part in _parts(data, int(part_megabytes * 1e6)):
        lines = part.decode().split("\n")[: part.count(b"\n")]
        num_lines += len(lines)
        ids = np.fromiter((i for e in peer(lines) for i in e.ids), dtype=np.int32)
        if not np.array_equal(ids, ours.encode_lines(part)[0]):
            raise UserError("the two tokenizers give different ids for this text; report it")
        for name, (function, turns) in contenders.items():
            argument = lines if name == PEER else part
            begin = time.process_time()
            for _ in range(turns):
                function(argument)
            seconds = max(time.process_time() - begin, 1e-9)
            rates[name].append(turns * len(part) / 1e6 / seconds)
    medians = {name: round(float(np.median(values)), 2) for name, values in rates.items()}
    ratios = [a / b for a, b in zip(rates[OURS], rates[PEER], strict=True)]
    ascii_letters = sum(map(data.count, (bytes([c]) for c in range(65, 123) if chr(c).isalpha())))
    return {
        "megabytes": round(len(data) / 1e6, 2),
        "num_lines": num_lines,
        "lines_that_differ": 0,
        "latin_share_of_bytes": round(ascii_letters / len(data), 3),
        "megabytes_per_second_per_core": medians,
        "ratio_to_peer": round(float(np.median(ratios)), 1),
        "ratio_p20": round(float(np.percentile(ratios, 20)), 1),
        "ratio_p80": round(float(np.percentile(ratios, 80)), 1),
    }


def _print(figures: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    names = list(figures[0]["megabytes_per_second_per_core"])
    table = Table("text", "Latin", *names, "ratio", title="MB/s of one core; no line differs")
    for row in figures:
        rates = row["megabytes_per_second_per_core"]
        table.add_row(
            row["text"],
            f"{row['latin_share_of_bytes']:.0%}",
            *(f"{rates[name]:,.1f}" for name in names),
            f"{row['ratio_to_peer']:.0f}x",
        )
    Console().print(table)
