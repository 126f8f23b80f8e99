"""What a report says about a corpus: what was read, kept and dropped, and how long its texts are.

It is made from corpus.json alone, like the files that `clue-ds shard --report` writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clue_ds import files
from clue_ds.data.build.report import ranges, summarise
from clue_ds.data.corpus import Corpus
from clue_ds.report.charts import bars
from clue_ds.report.page import table

MOST_UNKNOWN = 40


def body(directory: Path) -> str:
    """The page's content; UserError when there is no finished corpus."""
    corpus = Corpus(directory)
    report = summarise(files.read_json(corpus.manifest_file))
    counts = [
        ["tokens", f"{corpus.num_tokens:,}"],
        ["sentences", f"{corpus.num_sentences:,}"],
        ["documents", f"{corpus.num_documents:,}"],
        ["words in the vocabulary", f"{corpus.vocab_size:,}"],
        ["shards", f"{len(corpus.records):,}, {files.size_text(corpus.num_bytes)}"],
        ["share of tokens that are [UNK]", f"{report['unknown_share']:.3%}"],
        ["fingerprint", corpus.fingerprint],
        ["directory", str(directory)],
    ]
    parts = [table(["", ""], counts), '<div class="charts">']
    for unit in ("sentence", "document"):
        lengths = ranges(report[f"{unit}_tokens"])
        parts.append(bars(f"Tokens per {unit}: number of {unit}s", lengths))
    parts.append("</div>")
    for unit, account in report["accounts"].items():
        whole = max(1, account["read"])
        rows = [[_plain(k), f"{n:,}", f"{n / whole:.2%}"] for k, n in account.items()]
        parts.append(f"<h2>{unit.capitalize()}</h2>" + table([unit, "number", "share"], rows))
    edits = [[_plain(name), f"{number:,}"] for name, number in report["edits"].items()]
    parts.append("<h2>Changed, not dropped</h2>" + table(["change", "number"], edits))
    parts += _lists(report)
    options = [[name, str(value)] for name, value in report["options"].items()]
    parts.append("<h2>Options</h2>" + table(["option", "value"], options))
    return "".join(parts)


def _lists(report: dict[str, Any]) -> list[str]:
    """Tables of texts: what the vocabulary lacks, and samples of what was dropped."""
    parts = []
    if report["unknown"]:
        top = list(report["unknown"].items())[:MOST_UNKNOWN]
        rows = [[text, f"{number:,}"] for text, number in top]
        parts.append("<h2>Most frequent words that the vocabulary lacks</h2>")
        parts.append(table(["word", "in the text"], rows))
    samples = [*report["samples"].items(), ("rejected input", report["rejected_examples"])]
    for rule, texts in samples:
        if texts:
            parts.append(f"<h2>Samples: {_plain(rule)}</h2>" + table([""], [[t] for t in texts]))
    return parts


def _plain(name: str) -> str:
    return name.replace("_", " ")
