"""`clue-ds shard --report`: what a corpus holds and what was dropped, as JSON, page and picture.

The report is made from corpus.json alone, so it can be made again at any time. While it is made,
its counts are checked: what was accepted and what was dropped must add up to what was read.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from clue_ds import files
from clue_ds.data.build.options import FOREIGN, REASONS
from clue_ds.data.corpus import REPORT, Corpus
from clue_ds.data.text.decode import REJECTED_RECORDS
from clue_ds.errors import UserError

_LINES = (
    "blank_lines",
    "lines_not_utf8",
    "lines_without_tokens",
    *(f"lines_{reason}" for reason in REASONS[1:]),
    "lines_held_out",
)
_DOCUMENTS = (
    "documents_emptied",
    *(f"documents_{reason}" for reason in REASONS[FOREIGN:]),
    "documents_held_out",
)


def check_report() -> None:
    """Raise a UserError if the report can't be made here; called before the corpus is made."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            "the picture of --report needs matplotlib; install it with "
            "`pip install 'clue_ds[plots]'`"
        )


def write_report(directory: Path) -> Path:
    """Write report.json, report.md and report.png for a corpus; return the page."""
    manifest = files.read_json(Corpus(directory).manifest_file)
    target = directory / REPORT
    target.mkdir(exist_ok=True)
    report = summarise(manifest)
    files.write_json(target / "report.json", report)
    _draw(report, target / "report.png")
    page = target / "report.md"
    files.write_text(page, _page(report))
    return page


def summarise(manifest: dict[str, Any]) -> dict[str, Any]:
    """The content of report.json: accounts of lines, documents and records, and statistics."""
    counts, statistics = manifest["counts"], manifest["statistics"]
    accounts = {
        "lines": _account(counts, "lines", manifest["num_sentences"], _LINES),
        "documents": _account(counts, "documents", manifest["num_documents"], _DOCUMENTS),
    }
    if "records" in counts:
        accepted = counts.get("records_accepted", 0)
        accounts["records"] = _account(counts, "records", accepted, REJECTED_RECORDS)
    edits = ("characters_removed", "entities_replaced", "documents_split")
    return {
        "tokens": manifest["num_tokens"],
        "accounts": accounts,
        "edits": {name: counts.get(name, 0) for name in edits},
        "unknown_share": statistics["num_unknown"] / manifest["num_tokens"],
        "unknown": statistics.get("unknown", {}),
        "sentence_tokens": statistics["sentence_tokens"],
        "document_tokens": statistics["document_tokens"],
        "options": manifest["options"],
        "samples": manifest.get("samples", {}),
        "rejected_examples": manifest.get("rejected_examples", []),
    }


def _account(
    counts: dict[str, int], unit: str, accepted: int, dropped: tuple[str, ...]
) -> dict[str, int]:
    account = {"read": counts.get(unit, 0), "accepted": accepted}
    account |= {name: counts[name] for name in dropped if counts.get(name)}
    # "read" itself is among the values.
    assert account["read"] == sum(account.values()) - account["read"], f"{unit} don't add up"
    return account


def _page(report: dict[str, Any]) -> str:
    lines = ["# What this corpus holds, and what was dropped", "", "![](report.png)", ""]
    for unit, account in report["accounts"].items():
        lines += [f"## {unit.capitalize()}", "", f"| {unit} | number | share |", "|---|---|---|"]
        for name, number in account.items():
            share = number / max(1, account["read"])
            lines.append(f"| {name.replace('_', ' ')} | {number:,} | {share:.2%} |")
        lines.append("")
    lines += ["## Changed, not dropped", ""]
    lines += [f"- {number:,} {name.replace('_', ' ')}" for name, number in report["edits"].items()]
    share = f"{report['unknown_share']:.3%} of {report['tokens']:,} tokens are [UNK]."
    lines += ["", "## What the vocabulary lacks", "", share]
    if report["unknown"]:
        lines += ["The most frequent ones in the text, before anything was dropped:", ""]
        top = list(report["unknown"].items())[:40]
        lines.append(", ".join(f"{_code(text)} {number:,}" for text, number in top))
    for rule, texts in report["samples"].items():
        lines += ["", f"## Samples: {rule.replace('_', ' ')}", ""]
        lines += [f"- {_code(text)}" for text in texts]
    if report["rejected_examples"]:
        lines += ["", "## Rejected input", ""]
        lines += [f"- {_code(text)}" for text in report["rejected_examples"]]
    return "\n".join(lines) + "\n"


def _code(text: str) -> str:
    """`text` as a code span, so that Markdown shows it unchanged."""
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def ranges(counts: dict[str, int]) -> dict[str, int]:
    """`counts` with keys such as 5-8 instead of 8, the most of the range."""
    named = {}
    for most, number in counts.items():
        least = int(most) // 2 + 1
        named[most if least >= int(most) else f"{least}-{most}"] = number
    return named


def _draw(report: dict[str, Any], path: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    # The fonts that come with matplotlib have no Han characters, so the picture has no samples.
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False}):
        figure = Figure(figsize=(11, 3.6), layout="constrained")
        axes = figure.subplots(1, 3, width_ratios=(1.3, 1, 1))
        account = {k: n for k, n in report["accounts"]["lines"].items() if k != "read"}
        names = [name.removeprefix("lines_").replace("_", " ") for name in account]
        bars = axes[0].barh(names, list(account.values()), color="#4477aa")
        axes[0].bar_label(bars, labels=[f" {number:,}" for number in account.values()])
        axes[0].margins(x=0.25)
        axes[0].invert_yaxis()
        axes[0].set_title("lines that were read")
        axes[0].spines["right"].set_visible(False)
        axes[0].xaxis.set_visible(False)
        axes[0].spines["bottom"].set_visible(False)
        for axis, key, unit in zip(
            axes[1:], ("sentence_tokens", "document_tokens"), ("sentence", "document"), strict=True
        ):
            lengths = ranges(report[key])
            axis.bar(list(lengths), list(lengths.values()), color="#4477aa")
            axis.set_title(f"tokens per {unit}")
            axis.set_xlabel("tokens")
            axis.set_ylabel(f"number of {unit}s")
            axis.tick_params(axis="x", rotation=60)
            axis.spines["right"].set_visible(False)
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        figure.savefig(path, dpi=120)
