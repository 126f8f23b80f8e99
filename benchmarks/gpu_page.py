"""The page and the JSON of `clue-ds bench gpu`, from the files that its stages left."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

STEP_HEAD = ("case", "rows x length", "ms", "host ms", "busy ms", "kernels", "tokens/s", "MFU",
             "executed", "GiB", "start s")  # fmt: skip


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file; a last line that was cut off is left out."""
    found = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(text))
        except ValueError:
            break
    return found


def read_object(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def collect(folder: Path, stages: list[dict[str, Any]], is_small: bool) -> dict[str, Any]:
    """All figures of a run; a stage that left none has an empty list or object."""
    bandwidths = folder / "kernels.csv"
    rows: list[dict[str, Any]] = []
    if bandwidths.is_file():
        with bandwidths.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    return {
        "benchmark": "gpu",
        "rehearsal": is_small,
        "stages": stages,
        "kernel_check": read_object(folder / "kernel_check.json").get("kernel_errors", []),
        "device": read_object(folder / "device.json"),
        "kernels": rows,
        "steps": read_lines(folder / "steps.jsonl"),
        "pretraining": read_lines(folder / "run" / "log.jsonl"),
    }


def table(head: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


def _number(value: Any, form: str = ",.2f") -> str:
    return format(value, form) if isinstance(value, (int, float)) else ""


def _step_rows(lines: list[dict[str, Any]]) -> list[list[str]]:
    found = []
    for line in lines:
        where = f"{line.get('rows', '')} x {line['length']}" if "length" in line else ""
        if "error" in line:
            error = " ".join(line["error"].split())[:120].replace("|", "/")
            found.append([line["name"], where, error, *[""] * (len(STEP_HEAD) - 3)])
            continue
        found.append([
            line["name"], where, _number(line["ms"]), _number(line["host_ms"]),
            _number(line.get("busy_ms")), _number(line.get("kernels"), ",d"),
            _number(line["tokens_per_second"], ",d"), _number(line.get("mfu"), ".1%"),
            _number(line.get("hfu"), ".1%"), _number(line.get("memory_gib"), ".1f"),
            _number(line["warmup_s"], ".1f"),
        ])  # fmt: skip
    return found


def _ratios(lines: list[dict[str, Any]]) -> list[str]:
    """Our fastest step of a preset and length against the peer's without a mask."""
    found = []
    good = [line for line in lines if "error" not in line]
    for preset, length in dict.fromkeys((line["preset"], line["length"]) for line in good):
        here = [x for x in good if (x["preset"], x["length"]) == (preset, length)]
        peers = [x for x in here if x["loop"] == "peer"]
        # A graph or no attention dropout is not what a run does today.
        ours = [x for x in here if x["loop"] == "engine"]
        ours = ours or [x for x in here if not x["loop"].startswith(("peer", "graph"))]
        if peers and ours:
            best = max(ours, key=lambda x: x["tokens_per_second"])
            ratio = best["tokens_per_second"] / peers[0]["tokens_per_second"]
            found.append(
                f"- {preset}, length {length}: {best['name']} makes {ratio:.2f} times the tokens/s "
                f"of {peers[0]['name']}"
            )
    return found


def _kernel_rows(rows: list[dict[str, Any]]) -> list[list[str]]:
    clocks = {row["clock"] for row in rows}
    clock = "graph" if "graph" in clocks else "eager"
    return [
        [row["op"], row["hidden"], row["p"], row["mode"], row["provider"],
         f"{float(row['median_us']):.1f}", f"{float(row['gb_per_s']):,.0f}",
         f"{float(row['percent_of_copy']):.0f}%"]
        for row in rows if row["clock"] == clock
    ]  # fmt: skip


def _probe(name: str, value: Any) -> str:
    if isinstance(value, dict) and value and all(isinstance(v, dict) for v in value.values()):
        columns = list(dict.fromkeys(key for row in value.values() for key in row))
        rows = [[key, *(str(row.get(c, "")) for c in columns)] for key, row in value.items()]
        body = table(("", *columns), rows)
    elif isinstance(value, dict):
        body = table(("", "value"), [[key, str(v)] for key, v in value.items()])
    else:
        body = f"```\n{value}\n```\n"
    return f"### {name}\n\n{body}"


def page(result: dict[str, Any], environment: dict[str, Any]) -> str:
    """The page in Markdown."""
    device = environment["gpu"] or environment["cpu"]
    versions = ", ".join(f"{name} {v}" for name, v in environment["versions"].items())
    parts = [f"# First measurements: {device}", f"{environment['date']}; {versions}."]
    if result["rehearsal"]:
        parts.append(
            "**This is a rehearsal at small sizes. It shows that every stage runs; no figure on "
            "this page says anything about a GPU or about training.**"
        )
    parts += ["## Stages", table(("stage", "result", "seconds", "limit"), [
        [s["name"], s["result"], f"{s['seconds']:.0f}", f"{s['limit']:.0f}"]
        for s in result["stages"]
    ])]  # fmt: skip
    checks = result["kernel_check"]
    parts += ["## Kernels: do they agree with torch?"]
    if isinstance(checks, list) and checks:
        parts.append(table(("operation", "width", "dtype", "agrees", "error in torch's"), [
            [c["op"], str(c["width"]), c["dtype"],
             "yes" if c["agrees"] else f"**no**: {c['reason']}", f"{c['error']:.2f}"]
            for c in checks
        ]))  # fmt: skip
    else:
        parts.append(f"Not checked: {checks or 'the kernels can not run here'}.")
    parts.append("## Training steps")
    for preset in dict.fromkeys(line.get("preset") for line in result["steps"]):
        lines = [line for line in result["steps"] if line.get("preset") == preset]
        parts += [f"### {preset}", table(STEP_HEAD, _step_rows(lines))]
    parts += ["\n".join(_ratios(result["steps"])), _pretraining(result["pretraining"])]
    if result["kernels"]:
        head = ("operation", "width", "dropout", "pass", "provider", "us", "GB/s", "of a copy")
        parts += ["## Kernels: bandwidth", table(head, _kernel_rows(result["kernels"]))]
    parts.append("## What the device can do")
    parts += [_probe(name, value) for name, value in result["device"].items()]
    return "\n\n".join(part.rstrip("\n") for part in parts if part) + "\n"


def _pretraining(lines: list[dict[str, Any]]) -> str:
    if not lines:
        return "## A short pretraining\n\nIt left no log line; its log says why."
    shown = lines[:1] + lines[1:][-2:]
    head = ("step", "loss", "accuracy", "tokens/s", "MFU", "ms a step", "waiting for data ms")
    rows = [
        [str(x["step"]), _number(x["loss"], ".4f"), _number(x["mlm_accuracy"], ".1%"),
         _number(x["tokens_per_second"], ",.0f"), _number(x["mfu"], ".1%"),
         _number(1e3 * x["seconds_per_step"]), _number(x["data_wait_ms"])]
        for x in shown
    ]  # fmt: skip
    return f"## A short pretraining\n\n{table(head, rows)}"
