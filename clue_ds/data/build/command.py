"""`clue-ds shard`: converts raw text to a corpus directory, with any number of processes.

One reader cuts the input into chunks (inputs.py), and workers convert chunk i to shard i
(worker.py). Where duplicates are dropped, they then write the shards a second time (dedup.py).
corpus.json is written last.

Guarantees: the bytes of the directory depend only on the text and the options, not on --workers or
the number of MPI ranks. An interrupted run resumes at the first unfinished shard; it reads the text
again and compares the hashes of the chunks that were finished. At most one chunk per worker and one
more are in memory.

Rejected: appending to shards (a crash leaves a half-written one that looks complete) and resuming
by file position (compressed input can't seek, and a changed input would not be noticed).
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
from clue_ds.data.text.formats.parts import check_kinds, is_packed
from clue_ds.data.text.inputs import Chunk, chunk_hash, read_chunks
from clue_ds.data.text.sources import TextSource, resolve
from clue_ds.errors import UserError
from clue_ds.settings.arguments import PathOrName
from clue_ds.vocab_file import existing_text

# Bytes of a corpus per byte of text: a Chinese character of 3 bytes in UTF-8 becomes a token of 2
# bytes, and every sentence takes 4 more.
OUTPUT_SHARE = 0.8
# Bytes of text per byte of compressed input: gzip and zstandard pack Chinese text to about 0.3.
UNPACKED_SHARE = 3.5
_WORKER = "clue_ds.data.build.worker"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def shard(
    inputs: tyro.conf.Positional[tuple[PathOrName, ...]] = (),
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
    force: bool = False,
    verify: bool = False,
    report: bool = False,
) -> None:
    """Convert raw text to a corpus, a directory of shards that training memory-maps.

    Inputs are files, globs in quotes, - for standard input, and Hugging Face data sets: hf:NAME,
    hf:NAME:SPLIT, hf:NAME:CONFIG:SPLIT, or a directory that save_to_disk wrote. Files are UTF-8
    text (one sentence per line, a blank line between documents), or jsonl, JSON arrays, csv, tsv
    or parquet (one document per record), each also compressed (gzip, zstd, bzip2, xz) or in a zip
    or tar archive. Their content says what they are; docs/corpus.md lists the kinds.

    The corpus has the same bytes for any number of workers. If a run is interrupted, repeat the
    command to resume it.

    clue-ds shard 'text/*.txt.gz' --vocab vocab.txt --output corpus --t2s

    zcat dump.gz | clue-ds shard - --vocab vocab.txt --output corpus

    mpirun -n 17 clue-ds shard 'text/*.txt.gz' --vocab vocab.txt --output corpus

    clue-ds shard --verify --report --output corpus

    Args:
        inputs: files, globs, hf:NAME:SPLIT or -
        output: the corpus directory to write
        vocab: vocab.txt of the model to be trained; it is copied into the corpus
        lower_case: lower-case the text and remove accents, as BERT does
        words: how words are found for whole-word masking; with none, only ## pieces are marked
        segmented: the text is already segmented, so take its spaces as word boundaries
        t2s: first convert traditional characters to simplified ones (with OpenCC)
        format: format of the inputs; auto decides by their content and, between texts, their name
        text_field: name of the column or key that holds the text, in JSON, csv, parquet and hf:
        on_error: refuse stops at a bad byte or record and names it; skip drops and counts it
        clean: cleaning rules, described in docs/corpus.md
        held_out: share of the documents, chosen by hash, for a separate corpus, OUTPUT/held_out
        workers: number of processes; by default one per core, and under mpirun its ranks
        shard_megabytes: megabytes of text per shard; each process keeps the text of a few shards
        force: replace the corpus or the unfinished run that is in the output directory
        verify: check the checksums of the finished corpus; needs no inputs
        report: write counts, lengths and samples of dropped text to OUTPUT/report; needs no inputs
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
            if force or not _is_complete(build):
                run_build(build, opened, force)
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
    """The build that the arguments ask for; UserError for arguments that make no sense."""
    if vocab is None:
        raise UserError("--vocab is missing: give the vocab.txt of the model to be trained")
    if shard_megabytes <= 0:
        raise UserError("--shard-megabytes must be positive")
    if not 0 <= options.held_out < 1:
        raise UserError("--held-out must be from 0 to below 1: it is a share of the documents")
    options.clean.check()
    return Build(
        sources=resolve(inputs, format),
        output=output,
        vocab_file=existing_text(vocab),
        options=options,
        shard_bytes=max(1, int(shard_megabytes * (1 << 20))),
    )


def _verify(output: Path) -> None:
    from clue_ds.data.verification import verify_with_own_checksums  # compiled code

    for directory in (output, output / HELD_OUT):
        if directory == output or (directory / MANIFEST).is_file():
            corpus = Corpus(directory)
            verify_with_own_checksums(corpus)
            print(f"{directory}: {len(corpus.shards)} shards, all checksums agree")


class Build(NamedTuple):
    """What one run of the verb is to build, from what."""

    sources: list[TextSource]
    output: Path
    vocab_file: Path
    options: ConvertOptions
    shard_bytes: int

    @property
    def request(self) -> dict[str, Any]:
        """What must be equal to resume an unfinished run; corpus.json has the same keys later.

        Inputs count by their size and file name without directories, because they may have moved.
        """
        seen = [source.identity for source in self.sources]
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
    """Whether this corpus is finished already; UserError if another one is.

    Files are compared by name and size. Inputs of unknown size (standard input, data sets) are read
    and compared by their text.
    """
    if not (build.output / MANIFEST).is_file():
        return False
    Corpus(build.output)  # checks the sizes and headers of all shards
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
            f"{build.output} already holds a finished corpus of other inputs or options "
            f"({'; '.join(differences)}); choose another --output, or replace it with --force"
        )
    # A run that was killed just after it had written corpus.json leaves this directory.
    shutil.rmtree(build.output / STATE_DIRECTORY, ignore_errors=True)
    print(
        f"{build.output}: already complete, with the same options and inputs of the same "
        f"{'text' if is_read else 'names and sizes'}; nothing to do"
    )
    return True


def run_build(build: Build, workers: Workers, overwrite: bool) -> None:
    """Do what is left to do; if that fails, raise a UserError that tells how to resume."""
    _check_inputs(build)
    _check_room(build)
    check_kinds(build.sources)
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
                f"no room left for {build.output} ({error.strerror}); free some space and repeat "
                "the command: finished shards are kept"
            ) from None
        raise
    except BrokenProcessPool:
        raise UserError(
            "a worker was killed, most likely because memory ran out; repeat the command with "
            "fewer --workers, or start over with a smaller --shard-megabytes and another --output"
        ) from None
    print(format_counts(build.output, manifest))
    for_words, in_all = (sum(column) for column in zip(*seconds, strict=True))
    line = f"  {in_all:,.1f} s of processor time in the workers"
    print(line + (f", {for_words:,.1f} s of it for finding words" if for_words else ""))


def _check_inputs(build: Build) -> None:
    """Refuse files that can't be used before any work is done, not when their turn comes."""
    names = [source.name for source in build.sources if source.num_bytes is not None]
    closed = [name for name in names if not os.access(name, os.R_OK)]
    if closed:
        raise UserError(
            f"this user has no permission to read {len(closed)} input(s): {', '.join(closed[:5])}; "
            "change their permissions, or leave them out"
        )
    empty = [source.name for source in build.sources if source.num_bytes == 0]
    if empty and (build.options.on_error == "refuse" or len(empty) == len(build.sources)):
        raise UserError(
            f"{len(empty)} input(s) are empty: {', '.join(empty[:5])}; leave them out"
            + (", or ignore them with --on-error skip" if len(build.sources) > 1 else "")
        )


def _check_room(build: Build) -> None:
    """Refuse a run that would fill the disk; inputs of unknown size count as empty."""
    needed = sum(
        (source.num_bytes or 0) * OUTPUT_SHARE * (UNPACKED_SHARE if is_packed(source) else 1.0)
        for source in build.sources
    )
    needed -= sum(path.stat().st_size for path in build.output.glob("**/shard-*.bin"))
    existing = next(p for p in (build.output, *build.output.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"{build.output} would need about {files.size_text(needed)}, but only "
            f"{files.size_text(free)} are free there; free some space or choose another --output"
        )


def _convert_all(build: Build, staging: Staging, workers: Workers) -> None:
    """Convert every chunk that is not finished; progress is counted in bytes of the sources."""
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
    """The first arguments of `convert_chunk` and `drop_duplicates` in worker.py."""
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
                f"after byte or row {chunk[0].offset}); start over with --force"
            )
        progress.advance(_num_source_bytes(chunk), found=True)


def _drop_duplicates(build: Build, staging: Staging, workers: Workers) -> None:
    """Find duplicate documents, and put every shard into the corpus without them."""
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
