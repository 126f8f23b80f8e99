"""`clue-ds shard`: raw text in, a corpus directory out, by any number of processes.

One reader cuts the input into chunks (corpus.py), a pool of processes turns chunk i into shard i
(convert.py), and corpus.json is written when all are there. Guarantees: the directory's bytes
depend on the text and the options only, not on --workers; an interrupted run goes on at the first
unfinished shard (the text is read again, and each finished shard's text is compared by its hash);
at most --workers + 1 chunks are in memory.

Rejected: appending to shards (a crash leaves a half-written one that looks whole) and resuming by
file position (compressed input can't seek, and a changed input would go unnoticed).
"""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from clue_ds.data.convert import Converter, ConvertOptions
from clue_ds.data.corpus import InputFormat, Segment, Source, read_chunks, resolve
from clue_ds.data.manifest import finish, format_counts
from clue_ds.data.parsing import BLOCK_BYTES, OnError
from clue_ds.data.shards import Corpus, shard_name, write_shard
from clue_ds.data.staging import Staging
from clue_ds.data.words import Words
from clue_ds.errors import UserError, existing_file

# Chinese text takes 3 bytes a character in UTF-8 and 2 a token here, plus 4 a sentence.
OUTPUT_SHARE = 0.8
# Gzip and zstandard pack Chinese text to about 0.3 of its size.
UNPACKED_SHARE = 3.5
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def shard(
    inputs: tyro.conf.Positional[tuple[str, ...]] = (),
    /,
    *,
    output: Path,
    vocab: Path | None = None,
    lower_case: bool = True,
    words: Words = "rjieba",
    t2s: bool = False,
    format: InputFormat = "auto",
    text_field: str = "text",
    on_error: OnError = "refuse",
    workers: int | None = None,
    shard_megabytes: float = 128.0,
    overwrite: bool = False,
    verify: bool = False,
) -> None:
    """Turn raw text into a corpus: a directory of shards that training maps and never loads.

    Inputs, several at once: UTF-8 text (one sentence a line, a blank line between documents), jsonl
    or parquet (one document a record), each also as .gz or .zst; globs in quotes; hf:NAME:SPLIT for
    a Hugging Face data set, or a directory of its save_to_disk; - for standard input. The result is
    the same bytes for any number of workers. When a run is interrupted, give the same command again
    and it goes on where it stopped.

    clue-ds shard 'text/*.txt.gz' --vocab vocab.txt --output corpus --t2s

    zcat dump.gz | clue-ds shard - --vocab vocab.txt --output corpus

    clue-ds shard --verify --output corpus

    Args:
        inputs: files, globs, hf:NAME:SPLIT or -
        output: the corpus directory to write
        vocab: vocab.txt of the model; copied into the corpus
        lower_case: lower-case the text and remove accents, as BERT does
        words: what finds the words that whole-word masking masks; none: only ## pieces
        t2s: convert traditional characters to simplified ones first (OpenCC)
        format: what the inputs are; auto goes by the file name
        text_field: the column or key that holds the text, for jsonl, parquet and hf:
        on_error: refuse stops at bad bytes or records, naming them; skip drops and counts them
        workers: processes; as many as there are cores by default
        shard_megabytes: text that goes into one shard; a worker holds about six times as much
        overwrite: replace the corpus, or the unfinished run, that is in the output directory
        verify: compare the checksums of the finished corpus (without inputs: only that)
    """
    if inputs or not verify:
        if vocab is None:
            raise UserError("--vocab is missing: give the vocab.txt of the model to be trained")
        if shard_megabytes <= 0 or (workers is not None and workers < 1):
            raise UserError("--shard-megabytes and --workers must be positive")
        options = ConvertOptions(lower_case, words, t2s, text_field, on_error)
        build = Build(
            sources=resolve(inputs, format),
            output=output,
            vocab_file=existing_file(vocab, "vocabulary"),
            options=options,
            num_workers=workers or len(os.sched_getaffinity(0)),
            shard_bytes=max(1, int(shard_megabytes * (1 << 20))),
        )
        run_build(build, overwrite)
    if verify:
        corpus = Corpus(output)
        corpus.verify()
        print(f"{output}: {len(corpus.shards)} shards, all checksums agree")


class Build(NamedTuple):
    """One run of the verb."""

    sources: list[Source]
    output: Path
    vocab_file: Path
    options: ConvertOptions
    num_workers: int
    shard_bytes: int

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal for an unfinished run to go on."""
        return {
            "vocabulary": hashlib.sha256(self.vocab_file.read_bytes()).hexdigest(),
            "shard bytes": self.shard_bytes,
            "inputs": [[source.name, source.num_bytes] for source in self.sources],
            **self.options.as_dict(),
        }


def run_build(build: Build, overwrite: bool) -> None:
    """Do all that is left to do; raise a UserError that says how to go on when something fails."""
    _check_inputs(build)
    _check_room(build)
    # Made here first: a bad vocabulary is one error, and compiled code is cached for the workers.
    converter = Converter(str(build.vocab_file), build.options)
    converter.convert([Segment("text", "", 0, "暖身\n".encode())])
    try:
        with Staging(build.output, build.identity, overwrite) as staging:
            _convert_all(build, staging, converter)
            manifest = finish(build.output, build.vocab_file, build.options, staging)
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise UserError(
                f"no room left for {build.output} ({error.strerror}); free some space and give the "
                "same command again: finished shards are kept"
            ) from None
        raise
    except BrokenProcessPool:
        raise UserError(
            "a worker was killed, most likely because memory ran out; give the same command again "
            "with fewer --workers or another output with a smaller --shard-megabytes"
        ) from None
    print(format_counts(build.output, manifest))


def _check_inputs(build: Build) -> None:
    empty = [source.name for source in build.sources if source.num_bytes == 0]
    if empty and (build.options.on_error == "refuse" or len(empty) == len(build.sources)):
        raise UserError(
            f"{len(empty)} input(s) are empty: {', '.join(empty[:5])}; leave them out"
            + (", or pass over them with --on-error skip" if len(build.sources) > 1 else "")
        )


def _check_room(build: Build) -> None:
    """Refuse to begin what can't end; sizes that are not known are taken for nothing."""
    packed = (".gz", ".zst", ".zstd", ".parquet")
    needed = sum(
        (source.num_bytes or 0)
        * OUTPUT_SHARE
        * (UNPACKED_SHARE if source.name.endswith(packed) else 1.0)
        for source in build.sources
    )
    existing = next(p for p in (build.output, *build.output.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"{build.output} would need about {needed / 2**30:,.1f} GiB, and {free / 2**30:,.1f} "
            "GiB are free there; free some space or choose another --output"
        )


def _chunk_hash(chunk: list[Segment]) -> str:
    digest = hashlib.sha256()
    for segment in chunk:
        digest.update(f"{segment.format}:{segment.offset}:".encode())
        if isinstance(segment.data, bytes):
            digest.update(segment.data)
        else:
            digest.update(repr(segment.data).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _convert_chunk(converter: Converter, output: Path, index: int, chunk: list[Segment]) -> Any:
    """Write shard `index` unless it holds no token; return its record for the staging area."""
    arrays, tally = converter.convert(chunk)
    record = None
    max_token_id = -1
    if len(arrays.tokens):
        record = write_shard(output / shard_name(index), arrays)._asdict()
        max_token_id = int((arrays.tokens & (converter.tokenizer.continues - 1)).max())
    return {
        "input_sha256": _chunk_hash(chunk),
        "shard": record,
        "max_token_id": max_token_id,
        "counts": dict(tally.counts),
        "examples": tally.examples,
    }


_worker_converter: Converter


def _start_worker(vocab_file: str, options: ConvertOptions) -> None:
    global _worker_converter
    _worker_converter = Converter(vocab_file, options)


def _work(output: Path, index: int, chunk: list[Segment]) -> Any:
    return _convert_chunk(_worker_converter, output, index, chunk)


def _convert_all(build: Build, staging: Staging, converter: Converter) -> None:
    """Convert every chunk that is not done; progress goes by bytes of the sources."""
    sizes = [source.num_bytes for source in build.sources]
    total = None if None in sizes else sum(size for size in sizes if size)
    with _progress() as progress:
        task = progress.add_task("sharding", total=total)

        def advance(chunk: list[Segment]) -> None:
            progress.advance(task, sum(segment.num_source_bytes for segment in chunk))

        todo = _unfinished(build, staging, advance)
        if build.num_workers == 1:
            for index, chunk in todo:
                staging.put(index, _convert_chunk(converter, build.output, index, chunk))
                advance(chunk)
        else:
            for index, chunk, record in _in_pool(build, todo):
                staging.put(index, record)
                advance(chunk)


def _progress() -> Any:
    from rich import progress
    from rich.console import Console

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(binary_units=True),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _unfinished(
    build: Build, staging: Staging, advance: Any
) -> Iterator[tuple[int, list[Segment]]]:
    segment_bytes = min(BLOCK_BYTES, build.shard_bytes)
    chunks = read_chunks(build.sources, build.shard_bytes, segment_bytes, build.options.text_field)
    for index, chunk in enumerate(chunks):
        finished = staging.get(index)
        if finished is None:
            yield index, chunk
            continue
        if finished["input_sha256"] != _chunk_hash(chunk):
            raise UserError(
                f"the input changed since {build.output} was begun (first at {chunk[0].source}, "
                f"after byte or row {chunk[0].offset}); begin anew with --overwrite"
            )
        advance(chunk)


def _in_pool(
    build: Build, todo: Iterator[tuple[int, list[Segment]]]
) -> Iterator[tuple[int, list[Segment], Any]]:
    """(index, chunk, record) as they are done, with num_workers + 1 chunks in memory at most.

    Workers are spawned: forking a process that has run threads (tokenizers, numba) can hang.
    """
    pool = ProcessPoolExecutor(
        build.num_workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(str(build.vocab_file), build.options),
    )
    pending: dict[Future[Any], tuple[int, list[Segment]]] = {}
    try:
        for index, chunk in todo:
            pending[pool.submit(_work, build.output, index, chunk)] = (index, chunk)
            if len(pending) > build.num_workers:
                yield from _take_done(pending)
        while pending:
            yield from _take_done(pending)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _take_done(
    pending: dict[Future[Any], tuple[int, list[Segment]]],
) -> Iterator[tuple[int, list[Segment], Any]]:
    done, _ = wait(pending, return_when=FIRST_COMPLETED)
    for future in done:
        index, chunk = pending.pop(future)
        yield index, chunk, future.result()
