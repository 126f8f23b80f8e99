"""corpus.json: what a finished corpus says about itself, written last.

The account of the input adds up: lines = sentences + blank_lines + lines_not_utf8 +
lines_without_tokens, and for records likewise (parsing.Tally). Nothing in it depends on where,
when or by how many processes it was made.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from clue_ds.data.convert import ConvertOptions
from clue_ds.data.parsing import Tally
from clue_ds.data.shards import FORMAT_VERSION, MANIFEST, VOCAB_FILE, fingerprint, write_json
from clue_ds.data.staging import Staging
from clue_ds.data.tokenizer import token_dtype
from clue_ds.data.vocab import read_vocab, vocab_sha256
from clue_ds.errors import UserError

_REJECTED = ("lines_not_utf8", "records_not_utf8", "records_not_json", "records_without_text")
_ALWAYS = ("lines", "sentences", "blank_lines", "lines_not_utf8", "lines_without_tokens")


def finish(
    output: Path, vocab_file: Path, options: ConvertOptions, staging: Staging
) -> dict[str, Any]:
    """Copy the vocabulary, write corpus.json, remove the staging area; return the manifest."""
    records = staging.records()
    shards = [record["shard"] for record in records if record["shard"]]
    tally = Tally()
    for record in records:
        tally.add(Tally(Counter(record["counts"]), record["examples"]))
    if not shards:
        dropped = {name: number for name, number in tally.counts.items() if number}
        staging.remove()
        raise UserError(
            f"there is no text in the input, so {output} would be empty; what was read: "
            f"{dropped or 'nothing'}"
        )
    shutil.copyfile(vocab_file, output / VOCAB_FILE)
    num_tokens = len(read_vocab(vocab_file))
    manifest: dict[str, Any] = {
        "format": "clue_ds corpus",
        "version": FORMAT_VERSION,
        "vocab_sha256": vocab_sha256(vocab_file),
        "vocab_size": num_tokens,
        "token_bytes": token_dtype(num_tokens)(0).nbytes,
        "max_token_id": max(record["max_token_id"] for record in records),
        "options": options.as_dict() | _tools(options),
        "num_tokens": sum(shard["num_tokens"] for shard in shards),
        "num_sentences": sum(shard["num_sentences"] for shard in shards),
        "num_documents": sum(shard["num_documents"] for shard in shards),
        "counts": {name: tally.counts[name] for name in sorted({*tally.counts, *_ALWAYS})},
        "rejected_examples": tally.examples,
        "shards": shards,
    }
    manifest["fingerprint"] = fingerprint(manifest)
    write_json(output / MANIFEST, manifest)
    staging.remove()
    return manifest


def _tools(options: ConvertOptions) -> dict[str, str]:
    """Versions of what decided on tokens and words."""
    names = {"tokenizers": True, "rjieba": options.words == "rjieba", "OpenCC": options.t2s}
    return {
        f"{name.lower()}_version": importlib.metadata.version(name)
        for name, used in names.items()
        if used
    }


def format_counts(output: Path, manifest: dict[str, Any]) -> str:
    """The summary that the verb prints."""
    counts = manifest["counts"]
    num_bytes = sum(shard["num_bytes"] for shard in manifest["shards"])
    lines = [
        f"{output}: {manifest['num_tokens']:,} tokens in {manifest['num_sentences']:,} sentences "
        f"and {manifest['num_documents']:,} documents, {len(manifest['shards'])} shards, "
        f"{num_bytes / 2**20:,.1f} MiB"
    ]
    rejected = [
        f"{counts[name]:,} {name.replace('_', ' ')}" for name in _REJECTED if counts.get(name)
    ]
    if rejected:
        lines.append(f"  dropped: {', '.join(rejected)}; the first are in {output / MANIFEST}")
    return "\n".join(lines)
