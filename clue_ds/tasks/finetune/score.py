"""`clue-ds score`, and `clue-ds report` of fine-tuning: finished runs beside published scores.

Guarantees: only finished runs count; runs that differ only in their seed make one row, with mean
and standard deviation; a score from less than CLUE's whole split is marked, because it can't be
compared.
"""

from __future__ import annotations

import base64
import html
import io
import json
import statistics
import sys
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from clue_ds.errors import UserError
from clue_ds.report.page import page, table
from clue_ds.tasks import outputs, registry
from clue_ds.tasks.finetune.directory import RESULT, baselines, read_result, shown_scores
from clue_ds.tasks.task import Split

# The main score on the test sets, from the tables of CLUE and CLUEPretrainedModels.
PUBLISHED: dict[str, dict[str, float]] = {
    "BERT-base": {
        "afqmc": 73.70, "tnews": 56.58, "iflytek": 60.29, "cmnli": 79.69, "chid": 82.04,
        "c3": 64.50, "cmrc2018": 71.60, "drcd": 85.49, "cluener": 78.82,
    },
    "ALBERT-tiny": {
        "afqmc": 69.92, "tnews": 53.35, "iflytek": 48.71, "cmnli": 70.61, "chid": 43.53,
        "c3": 50.26, "cmrc2018": 53.35, "drcd": 70.08,
    },
    "RoBERTa-tiny-clue": {"afqmc": 69.52, "tnews": 54.57, "iflytek": 57.31, "cmnli": 73.10},
    "RoBERTa-wwm-large": {
        "afqmc": 74.44, "tnews": 58.41, "iflytek": 62.77, "cmnli": 82.20, "chid": 85.37,
        "c3": 73.82, "cmrc2018": 77.95, "drcd": 90.70, "cluener": 80.42,
    },
    "RoBERTa-large-clue": {"afqmc": 74.41, "tnews": 58.38, "iflytek": 63.58, "cmnli": 82.36},
}  # fmt: skip
# Other tasks have a column only if there is a run of them.
ALWAYS_SHOWN = ("afqmc", "tnews", "iflytek", "cmnli")
COLUMNS = ["task", "model", "settings", "seeds", "score", "second score", "without a model", "data"]


CONFIG = "config.json"  # of a model
SETTINGS = {"lr", "epochs", "batch_size", "max_length"}  # of a recipe, in the table
# What runs have in common that differ only in their seed; earlier versions recorded a part of it.
SAME = ("task", "model", "task_content", "model_content", "from_scratch", "limit", "data")


class Group(NamedTuple):
    """Finished runs that differ in nothing but the seed."""

    task: str
    model: str
    settings: str
    results: list[dict[str, Any]]

    @property
    def columns(self) -> list[tuple[str, str]]:
        return shown_scores(self.results[0])

    @property
    def score(self) -> float:
        """The mean of the main score."""
        key, _ = self.columns[0]
        return statistics.mean(result["best"][key] for result in self.results)

    def mean(self, key: str) -> str:
        values = [100 * result["best"][key] for result in self.results]
        if len(values) == 1:
            return f"{values[0]:.2f}"
        return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def score(
    places: Annotated[tuple[Path, ...], tyro.conf.Positional],
    markdown: Path | None = None,
    html: Path | None = None,
) -> None:
    """Print a table of fine-tuning runs over tasks and seeds, beside the published scores.

    Args:
        places: output directories of `clue-ds finetune`, directories of single runs, or models:
            runs/finetune/tnews/best/model, or a zip or directory that `clue-ds export` wrote.
        markdown: a file to write the tables to, as Markdown.
        html: a file to write the tables to, as one self-contained page.
    """
    from rich.console import Console
    from rich.table import Table

    groups = collect(places)
    # When the output is not a terminal, rich would wrap the hashes at 80 columns.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 180)
    for title, columns, rows in tables(groups):
        table = Table(*columns, title=title)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    if markdown is not None:
        outputs.write_text(markdown, as_markdown(groups))
        print(f"wrote {markdown}")
    if html is not None:
        outputs.write_text(html, as_html(groups))
        print(f"wrote {html}")


def run_of(place: Path) -> Path:
    """The run that a model directory lies in; other places are returned as they are."""
    inside = (place / CONFIG).is_file() and (place.resolve().parent / RESULT).is_file()
    return place.resolve().parent if inside else place


def is_alone(place: Path) -> bool:
    """Whether `place` is a model without its run: a zip, or a directory that was exported."""
    return place.is_file() or ((place / CONFIG).is_file() and run_of(place) == place)


def collect(places: tuple[Path, ...]) -> list[Group]:
    """The finished runs in `places`, grouped over seeds, CLUE's tasks in CLUE's order.

    A fine-tuned model without its run counts as one, with what it says about itself.
    """
    runs = [run_of(place) for place in places if not is_alone(place)]
    paths = {path.resolve() for place in runs for path in place.glob(f"**/{RESULT}")}
    results = [read_result(path.parent) for path in sorted(paths)]
    results += [_of_model(place) for place in places if is_alone(place)]
    if not results:
        where = f" in {', '.join(map(str, places))}" if places else ""
        raise UserError(
            f"there is no finished run ({RESULT}){where}; give an output directory of clue-ds "
            "finetune"
        )
    groups: dict[str, Group] = {}
    for result in results:
        same = {k: result.get(k) for k in SAME}
        key = json.dumps({**same, **result["recipe"], "seed": None})
        if key not in groups:
            groups[key] = Group(result["task"], _model(result), _settings(result), [])
        groups[key].results.append(result)
    order = {name: i for i, name in enumerate(registry.TASKS)}
    return sorted(groups.values(), key=lambda g: (order.get(g.task, len(order)), g.model))


def _of_model(place: Path) -> dict[str, Any]:
    """What a fine-tuned model says about its run, as far as the table needs it."""
    # Here, because `--help` needs no torch.
    from clue_ds.export import card, sources
    from clue_ds.tasks import kinds

    with sources.opened(place) as opened:
        about = opened.finetuned
    columns = tuple((key, title) for key, _, title, _ in card.scores(about))
    if about is None or about.task is None or not columns or not about.recipe.keys() >= SETTINGS:
        raise UserError(
            f"{place} is not a model that clue-ds finetune made: its {CONFIG} has no task with a "
            "score on dev and the settings of its run"
        )
    if about.task in registry.TASKS:
        columns = kinds.of(registry.get(about.task)).columns
    files: dict[str, dict[str, Any]] = {
        split: {"file": "", "sha256": digest} for split, digest in about.data.items()
    }
    files.setdefault("dev", {"file": "", "sha256": ""})
    for split, file in files.items():
        file |= {"num_examples": about.examples.get(split), "num_skipped": None}
    return {
        "task": about.task,
        "model": about.base or place.name,
        "from_scratch": about.from_scratch,
        "recipe": dict(about.recipe),
        "best": dict(about.dev),
        "columns": [column for column in columns if column[0] in about.dev],
        "baselines": {},
        "num_trained_on": about.examples.get("train"),
        "data": files,
        "test_versions": {},
    }


def _model(result: dict[str, Any]) -> str:
    return f"{result['model']}{', from random weights' if result['from_scratch'] else ''}"


def _settings(result: dict[str, Any]) -> str:
    recipe = result["recipe"]
    return (
        f"lr {recipe['lr']:g}, epochs {recipe['epochs']}, batch {recipe['batch_size']}, "
        f"length {recipe['max_length']}"
    )


def _data(result: dict[str, Any]) -> str:
    """How much of CLUE's data a run used: "whole", or the example counts of the splits."""
    task = registry.TASKS.get(result["task"])
    if result["num_trained_on"] is None:
        return "not recorded"  # a model of an earlier version, without its run
    counts: dict[Split, int] = {
        "train": result["num_trained_on"],
        "dev": result["data"]["dev"]["num_examples"],
    }
    counted = []
    for split, count in counts.items():
        published = task.num_published.get(split) if task else None
        whole = count + (result["data"][split]["num_skipped"] or 0 if split == "dev" else 0)
        if published is None:
            counted.append(f"{split} {count:,}")
        elif whole < published:
            counted.append(f"{split} {count:,} of {published:,}")
    return ", ".join(counted) or "whole"


def _without_model(result: dict[str, Any]) -> str:
    """The main score of what needs no model."""
    key, _ = shown_scores(result)[0]
    return "; ".join(f"{name}: {100 * s[key]:.2f}" for name, s in baselines(result).items())


def tables(groups: list[Group]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, column names, rows) of each table."""
    scores = []
    for group in groups:
        first = group.results[0]
        shown = [f"{title} {group.mean(key)}" for key, title in group.columns]
        scores.append(
            [
                group.task,
                group.model,
                group.settings,
                str(len(group.results)),
                *(*shown, "")[:2],
                _without_model(first),
                _data(first),
            ]
        )
    files = {}
    for group in groups:
        for split, about in group.results[0]["data"].items():
            counts = [about["num_examples"], about["num_skipped"]]
            shown = ["" if count is None else f"{count:,}" for count in counts]
            row = [group.task, split, about["file"], *shown, about["sha256"]]
            files[group.task, split, about["sha256"]] = row
        for version, digest in group.results[0]["test_versions"].items():
            files[group.task, version, digest] = [group.task, f"test {version}", "", "", "", digest]
    columns = ["task", "split", "file", "examples", "without label", "SHA-256"]
    return [
        ("dev scores, mean ± standard deviation over seeds (%)", COLUMNS, scores),
        (
            "main score (%) beside published models; * means less than all of CLUE's data, or that "
            "the data is not recorded",
            *_beside_published(groups),
        ),
        ("data", columns, list(files.values())),
    ]


def _beside_published(groups: list[Group]) -> tuple[list[str], list[list[str]]]:
    """(column names, rows), one column per task: our models on dev, published ones on test."""
    tasks = list(dict.fromkeys([*ALWAYS_SHOWN, *(group.task for group in groups)]))
    best: dict[str, dict[str, Group]] = {}
    for group in groups:  # the best settings of each model and task
        row = best.setdefault(group.model, {})
        if group.task not in row or group.score > row[group.task].score:
            row[group.task] = group
    rows = []
    for model, row in best.items():
        cells = []
        for task in tasks:
            mark = "*" if task in row and _data(row[task].results[0]) != "whole" else ""
            cells.append(_main(row[task]) + mark if task in row else "")
        rows.append([model, "dev", *cells])
    for model, scores in PUBLISHED.items():
        cells = [f"{scores[task]:.2f}" if task in scores else "" for task in tasks]
        rows.append([model, "test", *cells])
    return ["model", "on", *tasks], rows


def _main(group: Group) -> str:
    key, _ = group.columns[0]
    return group.mean(key)


def as_markdown(groups: list[Group]) -> str:
    """The tables as Markdown."""
    texts = []
    for title, columns, rows in tables(groups):
        lines = [f"**{title}**", "", "| " + " | ".join(columns) + " |"]
        lines.append("|" + "---|" * len(columns))
        lines += [
            "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows
        ]
        texts.append("\n".join(lines))
    return "\n\n".join(texts) + "\n"


def as_html(groups: list[Group], details: bool = False) -> str:
    """The tables as a page; `details` adds the plots and settings of every run."""
    body = [f"<h2>{html.escape(title)}</h2>" + table(c, r) for title, c, r in tables(groups)]
    if details:
        body += [_details(result) for group in groups for result in group.results]
    return page("Fine-tuning", "".join(body))


def _details(result: dict[str, Any]) -> str:
    recipe, best = result["recipe"], result["best"]
    settings = [[key, str(value)] for key, value in recipe.items()]
    title = f"{result['task']}, seed {recipe['seed']}: {_model(result)}"
    if "epochs" not in result:
        return (
            f"<h2>{html.escape(title)}</h2><p>From the model itself; the curves and the scores of "
            f"every class are in its run.</p>{table(['setting', 'value'], settings)}"
        )
    settings += [[key, value] for key, value in result["versions"].items()]
    return (
        f"<h2>{html.escape(title)}</h2><p>Best in epoch {best['epoch']} of "
        f"{len(result['epochs'])}; {result['seconds']:,.0f} s on {result['num_ranks']} "
        f"rank(s).</p>{_pictures(result)}"
        f"{_classes(result)}{table(['setting', 'value'], settings)}"
    )


def _classes(result: dict[str, Any]) -> str:
    """The table of classes of a classification task, or of the types of entities."""
    if "types" in result:
        counted = ("true", "predicted", "right")
        found = [
            [name, *(f"{type_[key]:,}" for key in counted), f"{100 * type_['f1']:.1f}"]
            for name, type_ in result["types"].items()
        ]
        return table(["type", "texts in dev", "predicted", "right", "F1 of text sets (%)"], found)
    if "confusion" not in result:
        return ""
    names = result["label_names"]
    truth = [sum(row) for row in result["confusion"]]
    rows = [
        [label, names.get(label, ""), f"{count:,}", f"{100 * f1:.1f}"]
        for label, count, f1 in zip(result["labels"], truth, result["f1_of_classes"], strict=True)
    ]
    return table(["class", "meaning", "dev examples", "F1 (%)"], rows)


def _pictures(result: dict[str, Any]) -> str:
    try:
        from clue_ds.tasks.finetune import plots
    except ModuleNotFoundError as error:
        raise UserError(
            f"the report's plots need {error.name}; run: pip install 'clue_ds[plots]'"
        ) from None
    images = []
    drawn = [(plots.curves, "curves")]
    if "confusion" in result:
        drawn.append((plots.confusion, "confusion matrix"))
    for draw, name in drawn:
        stream = io.BytesIO()
        draw(result, stream)
        data = base64.b64encode(stream.getvalue()).decode()
        images.append(f'<p><img alt="{name}" src="data:image/png;base64,{data}"></p>')
    return "".join(images)
