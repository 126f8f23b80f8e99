"""corpus.json: the manifest of a finished corpus, which is written last.

Guarantees: its counts add up, that is, every line, record and document that was read is either in
the corpus or counted under one reason why it is not (decode.Tally). Nothing in it depends on where,
when or by how many processes the corpus was made.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from clue_ds import files
from clue_ds.data.build.options import FOREIGN, REASONS, ConvertOptions
from clue_ds.data.build.staging import COMPARED, CONVERTED, Staging
from clue_ds.data.corpus import (
    FORMAT_VERSION,
    HELD_OUT,
    MANIFEST,
    VOCAB_FILE,
    fingerprint,
    manifest_checksum,
    token_dtype,
)
from clue_ds.data.text.decode import REJECTED_RECORDS, Tally
from clue_ds.data.text.vocab import read_vocab
from clue_ds.errors import UserError

_REJECTED = ("inputs_empty", "lines_not_utf8", *REJECTED_RECORDS)
_ALWAYS = ("lines", "sentences", "blank_lines", "lines_not_utf8", "lines_without_tokens")
_DROPPED = (
    *(f"lines_{reason}" for reason in REASONS[1:FOREIGN]),
    "documents_emptied",
    *(f"documents_{reason}" for reason in REASONS[FOREIGN:]),
    "documents_held_out",
    "characters_removed",
    "entities_replaced",
)
# Unknown characters that corpus.json lists, the most frequent ones.
MAX_UNKNOWN_LISTED = 100


def finish(
    output: Path, vocab_file: Path, options: ConvertOptions, staging: Staging
) -> dict[str, Any]:
    """Copy the vocabulary, write corpus.json, remove the staging area; return the manifest."""
    tally = Tally()
    sides: list[Any] = []
    for stage in (CONVERTED, COMPARED) if options.clean.compares_documents else (CONVERTED,):
        sides = []
        for record in staging.records(stage):
            tally.add(Tally.from_dict(record["tally"]))
            sides.append(record["sides"])
    training, held_out = ([side[i] for side in sides if side[i]] for i in (0, 1))
    _count_kept(tally, training, held_out)
    if not training:
        dropped = {name: number for name, number in tally.counts.items() if number}
        staging.remove()
        raise UserError(
            "there is no text in the input, or the cleaning rules drop all of it, so "
            f"{output} would be empty; give other inputs or change the rules. What was read: "
            f"{dropped or 'nothing'}"
        )
    if held_out:
        manifest = _manifest(vocab_file, options, held_out)
        manifest["counts"] = {name: manifest["num_sentences"] for name in ("lines", "sentences")}
        manifest["counts"]["documents"] = manifest["num_documents"]
        _write(output / HELD_OUT, vocab_file, manifest, held_out)
    manifest = _manifest(vocab_file, options, training)
    names = sorted({name for name, number in tally.counts.items() if number} | {*_ALWAYS})
    unknown = sorted(tally.unknown.items(), key=lambda item: (-item[1], item[0]))
    manifest["counts"] = {name: tally.counts[name] for name in names}
    manifest["statistics"]["unknown"] = dict(unknown[:MAX_UNKNOWN_LISTED])
    manifest["samples"] = {rule: tally.samples[rule] for rule in sorted(tally.samples)}
    manifest["rejected_examples"] = tally.examples
    manifest["shard_bytes"] = staging.request["shard_bytes"]
    hashes = (record["input_sha256"] for record in staging.records())
    manifest["inputs"] = staging.request["inputs"] | {"text_sha256": text_sha256(hashes)}
    _write(output, vocab_file, manifest, training)
    staging.remove()
    return manifest


def text_sha256(chunk_hashes: Iterable[str]) -> str:
    """SHA-256 of the whole input, made from the hashes of its chunks in order."""
    digest = hashlib.sha256()
    for chunk in chunk_hashes:
        digest.update(chunk.encode())
    return digest.hexdigest()


def _count_kept(
    tally: Tally, training: Iterable[dict[str, Any]], held_out: list[dict[str, Any]]
) -> None:
    """Add the counts of what is kept and what is held out, which only the finished shards have."""
    tally.counts["sentences"] = sum(side["shard"]["num_sentences"] for side in training)
    for name, key in (("lines", "num_sentences"), ("documents", "num_documents")):
        tally.counts[f"{name}_held_out"] = sum(side["shard"][key] for side in held_out)


def _manifest(
    vocab_file: Path, options: ConvertOptions, sides: list[dict[str, Any]]
) -> dict[str, Any]:
    shards = [side["shard"] for side in sides]
    num_tokens = len(read_vocab(vocab_file))
    histograms = {}
    for name in ("sentence_tokens", "document_tokens"):
        total: Counter[str] = Counter()
        for side in sides:
            total.update(side[name])
        histograms[name] = {length: total[length] for length in sorted(total, key=int)}
    manifest: dict[str, Any] = {
        "format": "clue_ds corpus",
        "version": FORMAT_VERSION,
        "vocab_sha256": files.sha256(vocab_file),
        "vocab_size": num_tokens,
        "token_bytes": token_dtype(num_tokens)(0).nbytes,
        "max_token_id": max(side["max_token_id"] for side in sides),
        "options": options.as_dict() | _tools(options),
        "num_tokens": sum(shard["num_tokens"] for shard in shards),
        "num_sentences": sum(shard["num_sentences"] for shard in shards),
        "num_documents": sum(shard["num_documents"] for shard in shards),
        "statistics": {"num_unknown": sum(side["num_unknown"] for side in sides), **histograms},
        "shards": shards,
    }
    manifest["fingerprint"] = fingerprint(manifest)
    return manifest


def _write(
    directory: Path, vocab_file: Path, manifest: dict[str, Any], sides: list[dict[str, Any]]
) -> None:
    shutil.copyfile(vocab_file, directory / VOCAB_FILE)
    # A run that an earlier version began has shards without checksums.
    if all("checksums" in side for side in sides):
        from clue_ds.data.checksums import write_checksums  # compiled code

        sums = [np.frombuffer(bytes.fromhex(side["checksums"]), "<u8") for side in sides]
        write_checksums(directory, manifest["fingerprint"], sums)
    manifest["checksum"] = manifest_checksum(manifest)
    files.write_json(directory / MANIFEST, manifest)


def _tools(options: ConvertOptions) -> dict[str, str]:
    """Versions of the libraries that decided on tokens, words and near duplicates."""
    names = {
        "tokenizers": True,
        "rjieba": options.words == "rjieba",
        "OpenCC": options.t2s,
        "datasketch": options.clean.near_duplicates > 0,
    }
    return {
        f"{name.lower()}_version": importlib.metadata.version(name)
        for name, used in names.items()
        if used
    }


def format_counts(output: Path, manifest: dict[str, Any]) -> str:
    """The summary that `clue-ds shard` prints at the end."""
    counts = manifest["counts"]
    num_bytes = sum(shard["num_bytes"] for shard in manifest["shards"])
    lines = [
        f"{output}: {manifest['num_tokens']:,} tokens in {manifest['num_sentences']:,} sentences "
        f"and {manifest['num_documents']:,} documents, {len(manifest['shards'])} shards, "
        f"{files.size_text(num_bytes)}"
    ]
    if manifest["options"]["held_out"] and not counts.get("documents_held_out"):
        lines.append(f"  held out: none of the {counts['documents']:,} documents: too few")
    for title, names in (("dropped", _REJECTED), ("by rule", _DROPPED)):
        found = [f"{counts[name]:,} {name.replace('_', ' ')}" for name in names if counts.get(name)]
        if found:
            lines.append(f"  {title}: {', '.join(found)}; samples are in {output / MANIFEST}")
    return "\n".join(lines)
