"""`clue-ds bench loader`: CPU time per batch, compared with other loaders of masked batches.

The first peer does what the usual `run_mlm` script does: a shuffled Arrow data set of token rows of
fixed length, and DataCollatorForLanguageModeling on each batch. The other peers are in
loader_peers.py and loader_children.py. All get the same tokens, length and batch size and use one
thread. They take turns of 8 batches, so that other load on the machine affects all of them, and
only the first batch of a turn finds another contender's data in the caches. The CPU time of making
batches is compared, without training: it is the wall time where nothing waits, and it depends less
on other load. Tokens per second do not count padding, which our other kinds of samples have.

The collator finds whole words by character offsets: tokens without a gap between them are one word.
In Chinese that would make one word of a sentence, so the rows get offsets with gaps between our
words, and the collator then masks the same words as we do.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clue_ds.benchmarks.description import write_results
from clue_ds.benchmarks.loader_children import STREAMING, streaming, transformers4, version_of
from clue_ds.benchmarks.loader_peers import torch_peers
from clue_ds.data import Corpus, SampleStream
from clue_ds.data.stream.samples import KINDS
from clue_ds.data.text.vocab import learn, read_vocab
from clue_ds.errors import UserError

Contenders = dict[str, Callable[[int], Any]]
BATCHES_A_TURN = 8


def loader(
    corpus: Path | None = None,
    text: Path | None = None,
    output: Path | None = None,
    seq_length: int = 128,
    batch_size: int = 256,
    batches: int = 120,
    seed: int = 0,
    transformers4_python: Path | None = None,
    streaming_python: Path | None = None,
) -> None:
    """Compare SampleStream with other loaders, with and without whole words: CPU time per batch.

    Args:
        corpus: directory written by `clue-ds shard`
        text: a text file instead of a corpus; a vocabulary and a corpus are made of it first
        output: JSON file for the figures, with device, versions and command
        seq_length: tokens per sequence
        batch_size: sequences per batch
        batches: timed batches of each contender, which take turns
        seed: of order and masks
        transformers4_python: interpreter with transformers 4.57, to compare its whole-word collator
        streaming_python: interpreter with mosaicml-streaming and litdata, to compare them
    """
    if (corpus is None) == (text is None):
        raise UserError("give exactly one of --corpus and --text")
    previous = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _corpus(corpus, text) as opened:
            sizes = (seq_length, batch_size, batches)
            figures = _measure(opened, *sizes, seed, transformers4_python, streaming_python)
    finally:
        torch.set_num_threads(previous)
    _print(figures)
    if output is not None:
        write_results(output, figures)


@contextlib.contextmanager
def _corpus(corpus: Path | None, text: Path | None) -> Iterator[Corpus]:
    """The corpus in a directory, or one that is made of a text file and deleted at the end."""
    if corpus is not None:
        yield Corpus(corpus)
        return
    from clue_ds.data.build.command import shard

    with tempfile.TemporaryDirectory() as directory:
        vocab, built = Path(directory) / "vocab.txt", Path(directory) / "corpus"
        learn((str(text),), output=vocab)
        shard((str(text),), output=built, vocab=vocab)
        yield Corpus(built)


def _arrow_rows(corpus: Corpus, seq_length: int, with_offsets: bool, directory: str) -> Any:
    """The corpus as a data set on disk, with the columns that the run_mlm script leaves."""
    import datasets
    from datasets import Features, Sequence, Value

    bit = 1 << (8 * corpus.shards[0].tokens.dtype.itemsize - 1)
    kinds = {"input_ids": "int32", "token_type_ids": "int8", "attention_mask": "int8"}
    kinds["special_tokens_mask"] = "int8"
    features = {name: Sequence(Value(kind)) for name, kind in kinds.items()}
    if with_offsets:
        features["offset_mapping"] = Sequence(Sequence(Value("int64")))
    vocab = read_vocab(corpus.vocab_file)
    cls_id, sep_id = vocab.index("[CLS]"), vocab.index("[SEP]")
    window = seq_length - 2
    fixed = {
        "token_type_ids": [0] * seq_length,
        "attention_mask": [1] * seq_length,
        "special_tokens_mask": [1, *[0] * window, 1],
    }

    shards = [shard.tokens for shard in corpus.shards]  # datasets hashes what the generator holds

    def rows() -> Iterator[dict[str, Any]]:
        for shard in shards:
            for begin in range(0, len(shard) - window + 1, window):
                tokens = shard[begin : begin + window]
                row = {"input_ids": [cls_id, *(tokens & (bit - 1)).tolist(), sep_id], **fixed}
                if with_offsets:
                    row["offset_mapping"] = _offsets(tokens & bit != 0)
                yield row

    return datasets.Dataset.from_generator(
        rows, features=Features(features), cache_dir=f"{directory}/{with_offsets}"
    )


def _offsets(continues: np.ndarray) -> list[list[int]]:
    """Offsets of one-character tokens with a gap before each that begins a word."""
    starts = np.cumsum(np.where(continues, 1, 2))
    return [[0, 0], *np.stack([starts, starts + 1], axis=1).tolist(), [0, 0]]


def _peers(corpus: Corpus, plain: Any, with_offsets: Any, batch_size: int) -> Contenders:
    from transformers import BertTokenizer, DataCollatorForLanguageModeling

    tokenizer = BertTokenizer.from_pretrained(corpus.directory, do_lower_case=corpus.lower_case)
    order = np.random.permutation(len(plain))

    def contender(rows: Any, **options: Any) -> Callable[[int], Any]:
        collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15, **options)

        def make(step: int) -> Any:
            places = order[np.arange(step * batch_size, (step + 1) * batch_size) % len(rows)]
            return collate(rows.__getitems__(places.tolist()))

        return make

    # Its whole-word masking always puts [MASK]; with these options it doesn't warn about that.
    whole_word = {"whole_word_mask": True, "mask_replace_prob": 1.0, "random_replace_prob": 0.0}
    return {
        "datasets + collator": contender(plain),
        "datasets + collator, whole word": contender(with_offsets, **whole_word),
    }


def _measure(
    corpus: Corpus,
    seq_length: int,
    batch_size: int,
    num_batches: int,
    seed: int,
    python4: Path | None,
    python_streaming: Path | None,
) -> dict[str, Any]:
    """Seconds per batch of each contender (median, 20th and 80th percentile), and ratios."""
    with tempfile.TemporaryDirectory() as directory:
        rows, rows_with_offsets = (
            _arrow_rows(corpus, seq_length, with_offsets, directory)
            for with_offsets in (False, True)
        )
        if len(rows) < batch_size:
            raise UserError(
                f"the corpus has {len(rows)} full rows of {seq_length} tokens, fewer than a batch "
                f"of {batch_size}; give more text or a smaller --batch-size"
            )
        streams = _streams(corpus, seq_length, batch_size, seed)
        contenders: Contenders = {
            **{name: stream.batch for name, stream in streams.items()},
            "memcpy of a batch": _memcpy(streams["clue_ds, whole word"].batch(0)),
            **torch_peers(corpus, seq_length, batch_size, directory),
            **_peers(corpus, rows, rows_with_offsets, batch_size),
        }
        with (
            transformers4(corpus, seq_length, batch_size, python4) as theirs,
            streaming(corpus, seq_length, batch_size, python_streaming) as streamed,
        ):
            timed = {name: _timed(make) for name, make in contenders.items()} | theirs | streamed
            seconds = _take_turns(timed, num_batches)
    # The peers' rows are all full.
    tokens: dict[str, float] = dict.fromkeys(seconds, batch_size * seq_length)
    tokens |= {name: _tokens(stream) for name, stream in streams.items()}
    figures = {name: _summary(times, batch_size, tokens[name]) for name, times in seconds.items()}
    return {
        "benchmark": "loader",
        "num_tokens": corpus.num_tokens,
        "seq_length": seq_length,
        "batch_size": batch_size,
        "num_batches": num_batches,
        "contenders": figures,
        "transformers4": version_of(python4, "transformers"),
        **{library: version_of(python_streaming, library) for library in STREAMING},
        "ratios": _ratios(figures),
    }


def _streams(
    corpus: Corpus, seq_length: int, batch_size: int, seed: int
) -> dict[str, SampleStream]:
    """Our streams: windows, which are what the peers make, and every other kind of samples."""
    streams = {}
    for kind in KINDS:
        for masking in ("", ", whole word"):
            name = "clue_ds" + ("" if kind == "windows" else f", {kind}") + masking
            streams[name] = SampleStream(
                corpus,
                seq_length,
                batch_size,
                seed,
                whole_word=bool(masking),
                samples=kind,  # type: ignore[arg-type]
            )
    return streams


def _tokens(stream: SampleStream) -> float:
    """Tokens of a batch without padding, as the mean of eight batches."""
    return float(np.mean([stream.arrays(step)["lengths"].sum() for step in range(8)]))


def _memcpy(batch: dict[str, torch.Tensor]) -> Callable[[int], Any]:
    """Copies all tensors of one of our batches: no loader can be faster."""
    return lambda step: [tensor.clone() for tensor in batch.values()]


def _ratios(figures: dict[str, dict[str, float]]) -> dict[str, float]:
    """How many times as fast as each peer our stream is, with the same kind of masking."""
    ratios = {}
    for name in figures:
        if not name.startswith("clue_ds"):
            ours = "clue_ds, whole word" if name.endswith(", whole word") else "clue_ds"
            ratios[name] = _ratio(figures, ours, name)
    return ratios


def _timed(make: Callable[[int], Any]) -> Callable[[int], float]:
    """A function that makes the batches of a turn and returns the CPU seconds per batch."""

    def run(turn: int) -> float:
        begin = time.process_time()
        for step in range(turn * BATCHES_A_TURN, (turn + 1) * BATCHES_A_TURN):
            make(step)
        return (time.process_time() - begin) / BATCHES_A_TURN

    return run


def _take_turns(timed: dict[str, Callable[[int], float]], num: int) -> dict[str, list[float]]:
    """Seconds per batch in each turn; the turns together make `num` batches or slightly more.

    A first turn, which is not counted, warms every contender up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for turn in range(1 + -(-num // BATCHES_A_TURN)):
        for name, run in timed.items():
            took = run(turn)
            if turn:
                seconds[name].append(took)
    return seconds


def _summary(times: list[float], batch_size: int, num_tokens: float) -> dict[str, float]:
    p20, median, p80 = np.percentile(times, [20, 50, 80])
    return {
        "milliseconds_median": round(1e3 * median, 4),
        "milliseconds_p20": round(1e3 * p20, 4),
        "milliseconds_p80": round(1e3 * p80, 4),
        "samples_per_second": round(batch_size / median),
        "million_tokens_per_second": round(num_tokens / median / 1e6, 3),
    }


def _ratio(figures: dict[str, dict[str, float]], ours: str, theirs: str) -> float:
    key = "milliseconds_median"
    return float(f"{figures[theirs][key] / figures[ours][key]:.3g}")


def _print(figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"batches of {figures['batch_size']} x {figures['seq_length']} tokens, one thread"
    table = Table(
        "contender", "CPU ms per batch", "p20 to p80", "samples/s", "Mtokens/s", title=title
    )
    for name, row in figures["contenders"].items():
        table.add_row(
            name,
            f"{row['milliseconds_median']:.2f}",
            f"{row['milliseconds_p20']:.2f} to {row['milliseconds_p80']:.2f}",
            f"{row['samples_per_second']:,}",
            f"{row['million_tokens_per_second']:.2f}",
        )
    console = Console()
    console.print(table)
    for peer, ratio in figures["ratios"].items():
        console.print(f"clue_ds is {ratio:g} times as fast as {peer}")
