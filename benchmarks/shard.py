"""`clue-ds bench shard`: the whole verb, text to corpus, against `datasets.map` and `tokenizers`.

The peer does what usual scripts do: it makes a data set of lines, tokenises them in batches by
`map` with the fast tokenizer of BertTokenizer, and calls `save_to_disk`. It finds no words. All
contenders take turns in this process, with one worker, on files cut from the same text. They are
compared by processor time, including reading, writing and checksums. `bytes.decode()` and a copy of
the bytes show the upper limits.

Memory is measured separately: `clue-ds shard` runs with two workers on a file of
--memory-megabytes, with the default rules and with every cleaning rule, and the memory of its
processes is sampled meanwhile.
"""

from __future__ import annotations

import gzip
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from clue_ds.benchmarks.description import write_results
from clue_ds.data.build.command import shard as build
from clue_ds.errors import UserError, existing_file

PEER = "datasets.map + tokenizers + save"
EVERY_RULE = (
    *("--t2s", "--on-error", "skip", "--held-out", "0.01", "--clean.html"),
    *("--clean.min-chars", "2", "--clean.max-chars", "2000", "--clean.min-han", "0.3"),
    *("--clean.repeated-lines", "--clean.duplicates", "--clean.near-duplicates", "0.8"),
)
Contender = Callable[[Path, Path], Any]


def shard(
    text: tyro.conf.Positional[Path],
    /,
    vocab: Path,
    output: Path | None = None,
    megabytes: float = 64.0,
    peer_megabytes: float = 2.0,
    rounds: int = 5,
    memory_megabytes: float = 0.0,
) -> None:
    """Compare `clue-ds shard`, with and without finding words, with datasets.map and tokenizers.

    Args:
        text: a text file with one sentence per line, also as .gz
        vocab: vocab.txt of a BERT model
        output: JSON file for the figures, with device, versions and command
        megabytes: megabytes of text for `clue-ds shard` in each round
        peer_megabytes: megabytes of text for the peer in each round; it is much slower
        rounds: how often each contender runs
        memory_megabytes: also measure the memory of `clue-ds shard` on a file of this size; 0: off
    """
    existing_file(vocab, "vocabulary")
    data = existing_file(text, "text").read_bytes()
    data = gzip.decompress(data) if text.suffix == ".gz" else data
    if not data:
        raise UserError(f"text {text} is empty")
    with tempfile.TemporaryDirectory() as directory:
        figures = _measure(data, vocab, Path(directory), megabytes, peer_megabytes, rounds)
        if memory_megabytes:
            figures["memory"] = _memory(data, vocab, Path(directory), memory_megabytes)
    _print(figures)
    if output is not None:
        write_results(output, {"benchmark": "shard", "text": text.name, **figures})


def _write(path: Path, data: bytes, megabytes: float) -> Path:
    """Write a file of about `megabytes`, in whole lines; a text that is shorter is repeated."""
    left = int(megabytes * 1e6)
    with open(path, "wb") as file:
        while left > 0:
            whole = len(data) <= left
            left -= file.write(data if whole else data[: data.find(b"\n", left) + 1 or len(data)])
    return path


def _ours(vocab: Path, words: Any) -> Contender:
    def run(text: Path, target: Path) -> None:
        build((str(text),), output=target, vocab=vocab, words=words, workers=1)

    return run


def _peer(vocab: Path, directory: Path) -> Contender:
    import datasets
    from transformers import BertTokenizer

    datasets.disable_progress_bars()
    (directory / "tokenizer").mkdir()
    shutil.copy(vocab, directory / "tokenizer" / "vocab.txt")
    tokenizer = BertTokenizer.from_pretrained(directory / "tokenizer", do_lower_case=True)

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        return {"input_ids": tokenizer(batch["text"], add_special_tokens=False)["input_ids"]}

    def run(text: Path, target: Path) -> None:
        lines = datasets.load_dataset(
            "text", data_files=str(text), split="train", cache_dir=str(target.with_suffix(".cache"))
        )
        lines.map(encode, batched=True, remove_columns=["text"]).save_to_disk(target)

    return run


def _measure(
    data: bytes, vocab: Path, directory: Path, megabytes: float, peer_megabytes: float, rounds: int
) -> dict[str, Any]:
    """MB/s of processor time of each contender: median over the rounds; ratios to the peer."""
    ours = _write(directory / "ours.txt", data, megabytes)
    theirs = _write(directory / "theirs.txt", data, peer_megabytes)
    contenders: dict[str, tuple[Contender, Path]] = {
        "clue-ds shard --words none": (_ours(vocab, "none"), ours),
        "clue-ds shard (rjieba)": (_ours(vocab, "rjieba"), ours),
        PEER: (_peer(vocab, directory), theirs),
        "bytes.decode()": (lambda text, _: text.read_bytes().decode(), ours),
        "memcpy": (lambda text, _: bytearray(text.read_bytes()), ours),
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(-1, rounds):  # round -1 warms up and isn't counted
        for name, (run, text) in contenders.items():
            target = directory / f"out{number}"
            begin = time.process_time()
            run(text, target)
            seconds = max(time.process_time() - begin, 1e-9)
            for path in directory.glob(f"{target.name}*"):
                shutil.rmtree(path)
            if number >= 0:
                rates[name].append(text.stat().st_size / 1e6 / seconds)
    medians = {name: round(float(np.median(values)), 2) for name, values in rates.items()}
    return {
        "megabytes": megabytes,
        "peer_megabytes": peer_megabytes,
        "rounds": rounds,
        "megabytes_per_second_per_core": medians,
        "ratios_to_peer": {
            name: round(medians[name] / medians[PEER], 1) for name in list(medians)[:2]
        },
    }


def _memory(data: bytes, vocab: Path, directory: Path, megabytes: float) -> dict[str, Any]:
    """Peak memory of `clue-ds shard --workers 2` with default rules and with every rule, in MiB."""
    text = _write(directory / "large.txt", data, megabytes)
    words = [sys.executable, "-m", "clue_ds.cli", "shard", str(text), "--vocab", str(vocab)]
    words += ["--workers", "2", "--force", "--output", str(directory / "large")]
    return {
        "text_megabytes": megabytes,
        "workers": 2,
        "default rules": _largest(words),
        "every rule": _largest([*words, *EVERY_RULE]),
    }


def _largest(words: list[str]) -> dict[str, int]:
    """Peak memory of a command, sampled 20 times per second, in MiB.

    Three numbers: the resident memory of the largest process, the sum over all processes (pages of
    shared libraries count in each), and the sum with each shared page counted once (PSS).
    """
    import psutil

    sizes = np.zeros(3)
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            try:
                family = [psutil.Process(process.pid)]
                family += family[0].children(recursive=True)
                memory = [one.memory_full_info() for one in family]
            except psutil.NoSuchProcess:
                continue
            resident = [one.rss for one in memory]
            now = max(resident), sum(resident), sum(one.pss for one in memory)
            sizes = np.maximum(sizes, now)
            time.sleep(0.05)
    if process.returncode:
        raise UserError(f"`{shlex.join(words[2:])}` failed; run it by hand to see why")
    names = ("largest_process", "all_processes", "all_processes_shared_pages_once")
    return {name: round(size / 2**20) for name, size in zip(names, sizes, strict=True)}


def _print(figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("contender", "MB/s per core", title="text file to corpus on disk")
    for name, rate in figures["megabytes_per_second_per_core"].items():
        table.add_row(name, f"{rate:,.1f}")
    console = Console()
    console.print(table)
    for name, ratio in figures["ratios_to_peer"].items():
        console.print(f"{name}: {ratio:.0f} times {PEER}")
    for rules in ("default rules", "every rule") if "memory" in figures else ():
        memory = figures["memory"][rules]
        console.print(
            f"memory with 2 workers, {rules}: {memory['largest_process']:,} MiB in the largest "
            f"process, {memory['all_processes']:,} MiB in all, of that "
            f"{memory['all_processes_shared_pages_once']:,} MiB with shared pages counted once"
        )
