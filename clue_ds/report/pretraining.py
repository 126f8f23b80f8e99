"""What a report says about pretraining runs; several stand side by side, each in its colour.

Everything comes from the run directories: config.yaml, log.jsonl, events.jsonl, the manifests of
checkpoints, and the corpus if it is still where the run read it. Nothing of it is required except
the config; what is missing is left out. Runs of earlier versions have no events.jsonl.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clue_ds import config as run_config
from clue_ds import files
from clue_ds.checkpoint import manifest
from clue_ds.config import RunConfig
from clue_ds.errors import UserError
from clue_ds.metrics import EVENTS, LOG, describe_seconds, parse_line
from clue_ds.report import charts
from clue_ds.report.charts import Curve, short
from clue_ds.report.page import table

HELD_OUT = "held_out"


def _percent(value: float) -> str:
    return f"{100 * value:.3g}%"


# Title of a chart -> key of the log line, and how its values are written.
CHARTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "Training loss": ("loss", short),
    "MLM accuracy": ("mlm_accuracy", _percent),
    "Loss on held-out text": ("held_out_loss", short),
    "MLM accuracy on held-out text": ("held_out_mlm_accuracy", _percent),
    "Accuracy on sentence pairs": ("pair_accuracy", _percent),
    "Accuracy on held-out pairs": ("held_out_pair_accuracy", _percent),
    "Learning rate": ("lr", lambda value: f"{value:.3g}"),
    "Gradient norm before clipping": ("grad_norm", short),
    "Tokens per second, all ranks": ("tokens_per_second", short),
    "Share of the device's peak (MFU)": ("mfu", _percent),
    "Waiting for data, ms per step": ("data_wait_ms", short),
    "Peak memory of rank 0, GiB": ("memory_gib", short),
    "Updates skipped so far": ("skipped_steps", short),
}


@dataclass
class Run:
    """One run as its directory shows it. `lines`: of the log, in order of steps."""

    directory: Path
    config: RunConfig
    lines: list[dict[str, Any]]
    events: list[dict[str, Any]]
    kept: list[int]  # steps of the checkpoints that still exist
    versions: dict[str, str] = field(default_factory=dict)

    def steps(self, kind: str) -> list[int]:
        """Steps of the events of a kind."""
        return [event["step"] for event in self.events if event["event"] == kind]

    @property
    def restarts(self) -> list[int]:
        return [step for step in self.steps("start")[1:] if step]

    @property
    def saves(self) -> list[int]:
        return sorted({*self.steps("saved"), *self.kept})


def read(directory: Path) -> Run:
    """The run in a directory; UserError when there is none."""
    path = directory / "config.yaml"
    if not path.is_file():
        raise UserError(f"{directory} is not a pretraining run: it has no config.yaml")
    by_step = {line["step"]: line for line in _records(directory / LOG)}
    published = manifest.published(directory / manifest.FOLDER)
    events = [e for e in _records(directory / EVENTS) if isinstance(e.get("event"), str)]
    started = [e["versions"] for e in events if isinstance(e.get("versions"), dict)]
    return Run(
        directory=directory,
        config=run_config.load(path),
        lines=[by_step[step] for step in sorted(by_step)],
        events=events,
        kept=[manifest.step_of(checkpoint) for checkpoint in published],
        versions=started[-1] if started else _versions(published),
    )


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """The complete records of a file of JSON lines that have a step."""
    if path.is_file():
        for raw in path.read_bytes().splitlines():
            line = parse_line(raw)
            if line is not None:
                yield line


def _versions(published: list[Path]) -> dict[str, str]:
    """Versions in the newest manifest that can be read."""
    for checkpoint in published:
        try:
            versions = files.read_json(checkpoint / manifest.FILE).get("versions")
        except UserError:
            continue
        if isinstance(versions, dict):
            return versions
    return {}


def body(runs: list[Run]) -> str:
    """The page's content."""
    names = _names(runs)
    parts = []
    if len(runs) > 1:
        items = (
            f'<span><i style="background:{charts.colour(number)}"></i>{html.escape(name)}</span>'
            for number, name in enumerate(names)
        )
        parts.append(f'<div class="legend">{"".join(items)}</div>')
    parts.append(table(["", *names], _summary(runs)))
    parts.append('<div class="charts">')
    last = max((run.lines[-1]["step"] for run in runs if run.lines), default=1)
    for title, (key, show) in CHARTS.items():
        parts.append(charts.chart(title, _curves(runs, names, key), show, last))
    parts.append(
        '</div><p class="soft">A dashed line is a restart, a triangle a saved checkpoint; the '
        "pointer over a curve shows its last value.</p>"
    )
    parts.append("<h2>Settings</h2>" + _settings(runs, names))
    for run, name in zip(runs, names, strict=True):
        title = f": {html.escape(name)}" if len(runs) > 1 else ""
        parts.append(f"<h2>Starts and saves{title}</h2>" + _history(run))
        parts.append(f"<h2>Corpus{title}</h2>" + _corpus(run))
    return "".join(parts)


def _names(runs: list[Run]) -> list[str]:
    """The directories' names, or their paths where two have the same name."""
    short_names = [run.directory.absolute().name for run in runs]
    if len(set(short_names)) == len(runs):
        return short_names
    return [str(run.directory) for run in runs]


def _curves(runs: list[Run], names: list[str], key: str) -> list[Curve]:
    curves = []
    for number, (run, name) in enumerate(zip(runs, names, strict=True)):
        points = [(line["step"], line[key]) for line in run.lines if _is_number(line.get(key))]
        if key == "skipped_steps" and not any(value for _, value in points):
            points = []
        # The figure of a first step says nothing about the speed of the others.
        if key in ("tokens_per_second", "mfu", "data_wait_ms") and len(points) > 2:
            points = points[1:]
        curves.append(Curve(name, number, points, run.restarts, run.saves))
    return curves


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _summary(runs: list[Run]) -> list[list[str]]:
    """Rows of what each run has reached."""
    rows: dict[str, list[str]] = {}

    def add(title: str, value: str) -> None:
        rows.setdefault(title, []).append(value)

    for run in runs:
        last = run.lines[-1] if run.lines else {}
        steps = run.config.train.steps
        done = last.get("step", 0)
        add("step", f"{done:,} of {steps:,} ({done / steps:.1%})")
        add("training loss", _shown(last.get("loss"), ".4f"))
        add("MLM accuracy", _shown(last.get("mlm_accuracy"), ".2%"))
        held_out = [line for line in run.lines if _is_number(line.get("held_out_loss"))]
        best = min(held_out, key=lambda line: line["held_out_loss"], default={})
        where = f" (step {best['step']:,})" if best else ""
        add("best loss on held-out text", _shown(best.get("held_out_loss"), ".4f") + where)
        add("samples seen", _shown(last.get("samples"), ",.0f"))
        elapsed = last.get("elapsed_s")
        spoken = describe_seconds(elapsed) if isinstance(elapsed, int | float) else "-"
        add("time in training", spoken)
        add("tokens per second", _shown(last.get("tokens_per_second"), ",.0f"))
        add("model", f"{run.config.model.preset}, {run.config.train.precision}")
        machines = dict.fromkeys(str(e["machine"]) for e in run.events if "machine" in e)
        add("machine", "; ".join(machines) or "-")
        add("versions", ", ".join(f"{k} {v}" for k, v in run.versions.items()) or "-")
        add("directory", str(run.directory))
    return [[title, *values] for title, values in rows.items()]


def _shown(value: Any, form: str) -> str:
    return format(value, form) if _is_number(value) else "-"


def _settings(runs: list[Run], names: list[str]) -> str:
    """What differs from the defaults or between the runs; all other settings behind a fold."""
    values = [dict(run_config.flatten(run.config.model_dump(), {"data.mixture"})) for run in runs]
    defaults = dict(run_config.flatten(_defaults(runs[0].config), {"data.mixture"}))
    changed, same = [], []
    for key, default in defaults.items():
        row = [key, *(_value(of_run[key]) for of_run in values)]
        if key in ("run_dir", "data.corpus"):  # there is no default
            changed.append((row + ["-"], len({*row[1:]}) > 1))
        elif any(of_run[key] != default for of_run in values):
            changed.append((row + [_value(default)], len({*row[1:]}) > 1))
        else:
            same.append([key, _value(default)])
    shown = table(["key", *names, "default"], *map(list, zip(*changed, strict=True)))
    marked = "Marked rows differ between the runs. " if len(runs) > 1 else ""
    return (
        f'<p class="soft">{marked}These differ from the defaults:</p>{shown}'
        f"<details><summary>{len(same)} settings with their default</summary>"
        f"{table(['key', 'value'], same)}</details>"
    )


def _defaults(config: RunConfig) -> dict[str, Any]:
    given = {"run_dir": config.run_dir, "data": {"corpus": config.data.corpus}}
    return run_config.validate(given, "defaults").model_dump()


def _value(value: Any) -> str:
    return "-" if value is None else value if isinstance(value, str) else json.dumps(value)


def _history(run: Run) -> str:
    """A row for each start, and how often the run was saved."""
    rows = []
    for event in run.events:
        if event["event"] != "saved":
            facts = (event.get("machine"), event.get("reason"))
            said = "; ".join(str(fact) for fact in facts if fact)
            rows.append([str(event.get("time", "-")), event["event"], f"{event['step']:,}", said])
    kept = ", ".join(f"{step:,}" for step in sorted(run.kept)) or "none"
    saved = len(run.steps("saved"))
    seconds = [e["seconds"] for e in run.events if _is_number(e.get("seconds"))]
    took = f", {sum(seconds) / len(seconds):.1f} s each on average" if seconds else ""
    text = (
        f"<p>Saved {saved or len(run.kept)} times{took}; checkpoints kept: after step {kept}.</p>"
    )
    if not rows:
        return text
    return table(["time", "event", "after step", "machine"], rows) + text


def _corpus(run: Run) -> str:
    """Counts of the corpora that the run read."""
    data = run.config.data
    held_out = data.held_out or str(Path(data.corpus) / HELD_OUT)
    rows = []
    for title, place in (("trained on", data.corpus), ("held out", held_out)):
        rows += _counts(title, Path(place))
    for place, share in data.mixture.items():
        rows += _counts(f"mixed in, {share:.1%} of the samples", Path(place))
    for number, phase in enumerate(run.config.phases, start=1):
        for place, share in (phase.data.mixture or {}).items():
            title = f"mixed in, {share:.1%} of the samples of phase {number}"
            rows += _counts(title, Path(place))
    if not rows:
        return f"<p>{html.escape(data.corpus)} is not there any more.</p>"
    columns = ["corpus", "directory", "tokens", "documents", "sentences", "shards", "words"]
    return table(columns, rows)


def _counts(title: str, directory: Path) -> list[list[str]]:
    path = directory / "corpus.json"
    if not path.is_file():
        return []
    try:
        found = files.read_json(path, "corpus")
        numbers = [found[f"num_{name}"] for name in ("tokens", "documents", "sentences")]
        numbers += [len(found["shards"]), found["vocab_size"]]
        return [[title, str(directory), *(f"{number:,}" for number in numbers)]]
    except (UserError, KeyError, TypeError, ValueError):
        return [[title, str(directory), "can't be read", "", "", "", ""]]
