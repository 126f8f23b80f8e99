"""`clue-ds shard`: raw text in, a corpus directory out, by any number of processes.

One reader cuts the input into chunks (corpus.py), workers turn chunk i into shard i (worker.py)
and, where duplicates are dropped, go over them once more (dedup.py); corpus.json is written when
all is there. Guarantees: the directory's bytes depend on the text and the options only, not on
--workers or MPI ranks; an interrupted run goes on at the first unfinished shard (the text is read
again, and each finished shard's text is compared by its hash); at most one chunk a worker and one
more are in memory.

Rejected: appending to shards (a crash leaves a half-written one that looks whole) and resuming by
file position (compressed input can't seek, and a changed input would go unnoticed).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from clue_ds import files
from clue_ds.data.build.corpus_manifest import finish, format_counts, text_sha256
from clue_ds.data.build.options import Cleaning, ConvertOptions
from clue_ds.data.build.progress import ShardProgress, open_progress
from clue_ds.data.build.report import check_report, write_report
from clue_ds.data.build.staging import COMPARED, Staging, compare_requests
from clue_ds.data.build.workers import Workers, open_workers
from clue_ds.data.corpus import HELD_OUT, MANIFEST, STATE_DIRECTORY, Corpus
from clue_ds.data.text.choices import InputFormat, OnError, WordFinder, Words
from clue_ds.data.text.decode import BLOCK_BYTES
from clue_ds.data.text.inputs import Chunk, TextSource, chunk_hash, read_chunks, resolve
from clue_ds.errors import UserError, existing_file

# Chinese text takes 3 bytes a character in UTF-8 and 2 a token here, plus 4 a sentence.
OUTPUT_SHARE = 0.8
# Gzip and zstandard pack Chinese text to about 0.3 of its size.
UNPACKED_SHARE = 3.5
_WORKER = "clue_ds.data.build.worker"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def shard(
    inputs: tyro.conf.Positional[tuple[str, ...]] = (),
    /,
    *,
    output: Path,
    vocab: Path | None = None,
    lower_case: bool = True,
    words: WordFinder = "rjieba",
    segmented: bool = False,
    t2s: bool = False,
    format: InputFormat = "auto",
    text_field: str = "text",
    on_error: OnError = "refuse",
    clean: Cleaning = Cleaning(),  # noqa: B008 (frozen)
    held_out: float = 0.0,
    workers: int | None = None,
    shard_megabytes: float = 32.0,
    overwrite: bool = False,
    verify: bool = False,
    report: bool = False,
) -> None:
    """Turn raw text into a corpus: a directory of shards that training maps and never loads.

    Inputs, several at once: UTF-8 text (one sentence a line, a blank line between documents), jsonl
    or parquet (one document a record), each also as .gz or .zst; globs in quotes; hf:NAME:SPLIT or
    hf:NAME:CONFIG:SPLIT for a Hugging Face data set, or a directory of its save_to_disk; - for
    standard input. The result is the same bytes for any number of workers. When a run is
    interrupted, give the same command again and it goes on where it stopped.

    clue-ds shard 'text/*.txt.gz' --vocab vocab.txt --output corpus --t2s

    zcat dump.gz | clue-ds shard - --vocab vocab.txt --output corpus

    mpirun -n 17 clue-ds shard 'text/*.txt.gz' --vocab vocab.txt --output corpus

    clue-ds shard --verify --report --output corpus

    Args:
        inputs: files, globs, hf:NAME:SPLIT or -
        output: the corpus directory to write
        vocab: vocab.txt of the model; copied into the corpus
        lower_case: lower-case the text and remove accents, as BERT does
        words: what finds the words that whole-word masking masks; none: only ## pieces are marked
        segmented: the text is segmented already: its spaces are the words
        t2s: convert traditional characters to simplified ones first (OpenCC)
        format: what the inputs are; auto goes by the file name
        text_field: the column or key that holds the text, for jsonl, parquet and hf:
        on_error: refuse stops at bad bytes or records, naming them; skip drops and counts them
        clean: rules that clean the text, see docs/corpus.md
        held_out: share of the documents, by their hash, that become a corpus in OUTPUT/held_out
        workers: processes; as many as there are cores by default, and under mpirun its ranks
        shard_megabytes: text that goes into one shard; processes hold some of these in memory
        overwrite: replace the corpus, or the unfinished run, that is in the output directory
        verify: compare the checksums of the finished corpus (without inputs: only that)
        report: write counts, lengths, unknown characters and samples of what was dropped, with a
            picture, to OUTPUT/report (without inputs: of the finished corpus)
    """
    with open_workers(workers if inputs else 1) as opened:
        if opened is None:  # an MPI rank whose work is done
            return
        if report:
            check_report()
        if inputs or not (verify or report):
            found_by: Words = "segmented" if segmented else words
            options = ConvertOptions(
                lower_case, found_by, t2s, text_field, on_error, held_out, clean
            )
            build = _plan(inputs, output, vocab, options, format, shard_megabytes)
            if overwrite or not _is_complete(build):
                run_build(build, opened, overwrite)
        if verify:
            _verify(output)
        if report:
            print(f"report: {write_report(output)}")


def _plan(
    inputs: tuple[str, ...],
    output: Path,
    vocab: Path | None,
    options: ConvertOptions,
    format: InputFormat,
    shard_megabytes: float,
) -> Build:
    """What is to be done; UserError for what can't be."""
    if vocab is None:
        raise UserError("--vocab is missing: give the vocab.txt of the model to be trained")
    if shard_megabytes <= 0:
        raise UserError("--shard-megabytes must be positive")
    if not 0 <= options.held_out < 1:
        raise UserError("--held-out is a share of the documents, from 0 to below 1")
    options.clean.check()
    return Build(
        sources=resolve(inputs, format),
        output=output,
        vocab_file=existing_file(vocab, "vocabulary"),
        options=options,
        shard_bytes=max(1, int(shard_megabytes * (1 << 20))),
    )


def _verify(output: Path) -> None:
    for directory in (output, output / HELD_OUT):
        if directory == output or (directory / MANIFEST).is_file():
            corpus = Corpus(directory)
            corpus.verify()
            print(f"{directory}: {len(corpus.shards)} shards, all checksums agree")


class Build(NamedTuple):
    """One run of the verb."""

    sources: list[TextSource]
    output: Path
    vocab_file: Path
    options: ConvertOptions
    shard_bytes: int

    @property
    def request(self) -> dict[str, Any]:
        """What must be equal for an unfinished run to go on; corpus.json says the same later.

        Of an input the size and the last part of its name: it may have moved.
        """
        seen = [[source.path.name, source.num_bytes] for source in self.sources]
        return {
            "vocab_sha256": files.sha256(self.vocab_file),
            "shard_bytes": self.shard_bytes,
            "inputs": {
                "number": len(seen),
                "num_bytes": sum(source.num_bytes or 0 for source in self.sources),
                "names_sha256": hashlib.sha256(json.dumps(seen).encode()).hexdigest(),
            },
            "options": self.options.as_dict(),
        }


def _is_complete(build: Build) -> bool:
    """Whether the corpus is there already; UserError where it was made of something else.

    Files are compared by name and size; text of unknown size (standard input, a data set) is read.
    """
    if not (build.output / MANIFEST).is_file():
        return False
    Corpus(build.output)  # which compares the sizes and headers of all shards
    manifest = files.read_json(build.output / MANIFEST)
    if manifest["counts"].get("documents_held_out"):
        Corpus(build.output / HELD_OUT)
    differences = compare_requests(manifest, build.request)
    is_read = None in [source.num_bytes for source in build.sources]
    if is_read and not differences:
        found = text_sha256(chunk_hash(chunk) for chunk in _chunks(build))
        if found != manifest["inputs"]["text_sha256"]:
            differences = ["the text of the inputs"]
    if differences:
        raise UserError(
            f"{build.output} already holds a finished corpus of something else "
            f"({'; '.join(differences)}); choose another --output, or replace it with --overwrite"
        )
    # A run that was killed when it had written corpus.json leaves it.
    shutil.rmtree(build.output / STATE_DIRECTORY, ignore_errors=True)
    print(
        f"{build.output}: complete already, with these settings and inputs of "
        f"{'this text' if is_read else 'these names and sizes'}; nothing to do"
    )
    return True


def run_build(build: Build, workers: Workers, overwrite: bool) -> None:
    """Do all that is left to do; raise a UserError that says how to go on when something fails."""
    _check_inputs(build)
    _check_room(build)
    list(workers.run(f"{_WORKER}:prepare", [(None, (str(build.vocab_file), build.options))]))
    try:
        with Staging(build.output, build.request, overwrite) as staging:
            _convert_all(build, staging, workers)
            if build.options.clean.compares_documents:
                _drop_duplicates(build, staging, workers)
            seconds = [record["seconds"] for record in staging.records()]
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
    for_words, in_all = (sum(column) for column in zip(*seconds, strict=True))
    line = f"  {in_all:,.1f} s of processor time in the workers"
    print(line + (f", {for_words:,.1f} s of it to find words" if for_words else ""))


def _check_inputs(build: Build) -> None:
    """Refuse at once what would stop the run at its last file."""
    names = [source.name for source in build.sources if source.num_bytes is not None]
    closed = [name for name in names if not os.access(name, os.R_OK)]
    if closed:
        raise UserError(
            f"{len(closed)} input(s) may not be read by this user: {', '.join(closed[:5])}; change "
            "their permissions, or leave them out"
        )
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
    needed -= sum(path.stat().st_size for path in build.output.glob("**/shard-*.bin"))
    existing = next(p for p in (build.output, *build.output.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"{build.output} would need about {needed / 2**30:,.1f} GiB, and {free / 2**30:,.1f} "
            "GiB are free there; free some space or choose another --output"
        )


def _convert_all(build: Build, staging: Staging, workers: Workers) -> None:
    """Convert every chunk that is not done; progress goes by bytes of the sources."""
    sizes = [source.num_bytes for source in build.sources]
    total = None if None in sizes else sum(size for size in sizes if size)
    with open_progress(total) as progress:
        tasks = (
            ((index, _num_source_bytes(chunk)), (*_common(build), index, chunk))
            for index, chunk in _unfinished(build, staging, progress)
        )
        for (index, num_bytes), record in workers.run(f"{_WORKER}:convert_chunk", tasks):
            staging.put(index, record)
            progress.advance(num_bytes)


def _common(build: Build) -> tuple[Path, str, ConvertOptions]:
    """The arguments that all functions of worker.py begin with."""
    return build.output, str(build.vocab_file), build.options


def _num_source_bytes(chunk: Chunk) -> int:
    return sum(segment.num_source_bytes for segment in chunk)


def _chunks(build: Build) -> Iterator[Chunk]:
    segment_bytes = min(BLOCK_BYTES, build.shard_bytes)
    return read_chunks(build.sources, build.shard_bytes, segment_bytes, build.options.text_field)


def _unfinished(
    build: Build, staging: Staging, progress: ShardProgress
) -> Iterator[tuple[int, Chunk]]:
    for index, chunk in enumerate(_chunks(build)):
        finished = staging.get(index)
        if finished is None:
            yield index, chunk
            continue
        if finished["input_sha256"] != chunk_hash(chunk):
            raise UserError(
                f"the input changed since {build.output} was begun (first at {chunk[0].source}, "
                f"after byte or row {chunk[0].offset}); begin anew with --overwrite"
            )
        progress.advance(_num_source_bytes(chunk), found=True)


def _drop_duplicates(build: Build, staging: Staging, workers: Workers) -> None:
    """Find the documents that occur twice, and give every shard its place without them."""
    sides = [record["sides"] for record in staging.records()]
    task = (build.output, len(sides), build.options.clean)
    list(workers.run(f"{_WORKER}:find_duplicates", [(None, task)]))
    tasks = (
        (index, (*_common(build), index, of_chunk))
        for index, of_chunk in enumerate(sides)
        if staging.get(index, COMPARED) is None
    )
    for index, record in workers.run(f"{_WORKER}:drop_duplicates", tasks):
        staging.put(index, record, COMPARED)
