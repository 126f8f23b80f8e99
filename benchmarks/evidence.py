"""`clue-ds bench evidence`: does pretraining help? Fine-tune one network, pretrained or not.

The network is pretrained on the training texts of the tasks, without labels, and on text files of
the user. Then the pretrained network and one with random weights are fine-tuned with the same
examples, settings and seeds. With a config for pairs there is a third start for the pair tasks: the
pretrained network, trained further on all labelled pairs of their train splits. Dev and test texts
are never trained on. Every step is a verb that a user could type; the same command continues after
a kill.
"""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from clue_ds.benchmarks.description import write_results
from clue_ds.errors import UserError, existing_file
from clue_ds.tasks import examples, registry

# How each task is fine-tuned, from both starts: what suited models of this size and training in
# docs/recipe-study.md. IFLYTEK's texts are long. A pretrained network learns 3,000 pairs by
# heart; in large batches without dropout it is soonest at its best epoch.
COMMON = {"batch_size": 16, "dropout": 0.1, "max_length": 64}
PAIRS = {"limit": 3_000, "epochs": 6, "lr": 3e-4, "batch_size": 64, "dropout": 0.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "tnews": {"limit": 6_000, "epochs": 6, "lr": 1.5e-4},
    "iflytek": {"limit": 6_000, "epochs": 8, "lr": 3e-4, "max_length": 256},
    "afqmc": PAIRS,
    "cmnli": PAIRS,
}
TASKS = tuple(SETTINGS)
# The weights that fine-tuning starts from -> their colour in the plot.
STARTS = {"pretrained": "tab:blue", "pair": "tab:green", "from_scratch": "tab:orange"}


def evidence(
    data: Path,
    vocab: Path,
    config: Path,
    corpora: tuple[Path, ...] = (),
    checkpoint: Path | None = None,
    pair_config: Path | None = None,
    work: Path = Path("runs/evidence"),
    output: Path | None = None,
    tasks: tuple[str, ...] = TASKS,
    seeds: int = 3,
    limit: int | None = None,
    epochs: int | None = None,
    lr: float | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    dropout: float | None = None,
) -> None:
    """Pretrain on the tasks' unlabelled texts, fine-tune, and compare with random weights.

    Args:
        data: the directory that holds the tasks' files.
        vocab: vocab.txt.
        config: config of pretraining (recipes/evidence.yaml).
        corpora: further text files, one sentence per line, a blank line between documents.
        checkpoint: a pretrained run to use instead of pretraining one.
        pair_config: config for training further on labelled pairs
            (recipes/evidence_pair.yaml).
        work: the directory for texts, corpus and runs; after a kill the same command continues
            there.
        output: JSON file for the figures; a plot is written beside it.
        tasks: tasks to fine-tune on.
        seeds: number of runs of each task and start.
        limit: most examples to fine-tune on; the dev split is always used whole. This option and
            the next five are for all tasks; by default each has its own, which the JSON names.
        epochs: epochs of fine-tuning.
        lr: peak learning rate of fine-tuning.
        batch_size: examples per step of fine-tuning.
        max_length: most tokens of a text in fine-tuning.
        dropout: dropout in fine-tuning.
    """
    existing_file(vocab, "vocabulary")
    existing_file(config, "config file")
    work.mkdir(parents=True, exist_ok=True)
    if checkpoint is None:
        checkpoint = _pretrain(work, data, vocab, config, corpora)
    model = work / "model"
    if not model.exists():
        _verb("export", checkpoint, "--to", "hf", "--output", model)
    starts = {"pretrained": (tasks, model), "from_scratch": (tasks, model)}
    if pair_config is not None:
        pair_tasks = tuple(name for name in tasks if registry.get(name).kind == "pair")
        starts["pair"] = (pair_tasks, _train_on_pairs(work, data, pair_config, pair_tasks, model))
    given = {
        "limit": limit,
        "epochs": epochs,
        "lr": lr,
        "batch_size": batch_size,
        "max_length": max_length,
        "dropout": dropout,
    }
    settings = {name: settings_of(name, given) for name in tasks}
    for start, (names, weights) in starts.items():
        for name in names:
            own = ["--model", weights, "--data", data, "--output", work / start, "--task", name]
            own += ["--from-scratch"] if start == "from_scratch" else []
            own += ["--seeds", seeds, "--precision", "bf16"]
            for key, value in settings[name].items():
                own += [f"--{key.replace('_', '-')}", value]
            _verb("finetune", *own)
    rows = {name: _row(work, name, starts, seeds) for name in tasks}
    log = _log(checkpoint)
    figures = {"num_seeds": seeds, "settings": settings, "tasks": rows, "log": log}
    _print(figures)
    if output is not None:
        write_results(output, {"benchmark": "evidence", **figures})
        draw(figures, output.with_suffix(".png"))
        print(f"wrote the plot {output.with_suffix('.png')}")


def settings_of(task: str, given: dict[str, Any]) -> dict[str, Any]:
    """How a task is fine-tuned: COMMON, its entry of SETTINGS, and what the user has `given`."""
    chosen = {key: value for key, value in given.items() if value is not None}
    return COMMON | SETTINGS.get(task, {}) | chosen


def _verb(*words: object) -> None:
    arguments = [str(word) for word in words]
    print("$ " + shlex.join(["clue-ds", *arguments]), flush=True)
    done = subprocess.run([sys.executable, "-m", "clue_ds.cli", *arguments])
    if done.returncode:
        raise UserError(f"clue-ds {arguments[0]} ended with status {done.returncode}; see above")


def _pretrain(
    work: Path,
    data: Path,
    vocab: Path,
    config: Path,
    corpora: tuple[Path, ...],
) -> Path:
    """Pretrain; return the directory of the run."""
    corpus, run_dir = work / "corpus", work / "run"
    if not corpus.exists():
        texts = [*write_texts(work / "text", data), *corpora]
        _verb("shard", *texts, "--vocab", vocab, "--output", corpus)
    place = ["--data.corpus", corpus, "--run_dir", run_dir]
    _verb("pretrain", "--config", config, *place)
    return run_dir


def _train_on_pairs(
    work: Path, data: Path, config: Path, tasks: tuple[str, ...], model: Path
) -> Path:
    """Train the pretrained model further on the labelled pairs of the tasks' train splits."""
    existing_file(config, "config file")
    run_dir, pair_model = work / "pair-run", work / "pair-model"
    if not pair_model.exists():
        pairs = [examples.find(registry.get(name), data, "train") for name in tasks]
        place = ["--data.corpus", model, "--model.init", model, "--run_dir", run_dir]
        _verb("pretrain", "--config", config, *place, "--data.pairs", *pairs)
        _verb("export", run_dir, "--to", "hf", "--output", pair_model)
    return pair_model


def write_texts(directory: Path, data: Path) -> list[Path]:
    """Write one file per task, with each training example as a document, without its label."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name in TASKS:
        task = registry.get(name)
        documents = []
        for example in examples.read(task, examples.find(task, data, "train")):
            texts = (example.text,) if isinstance(example.text, str) else example.text
            documents.append("\n".join(" ".join(text.split()) for text in texts))
        paths.append(directory / f"{name}.txt")
        paths[-1].write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    return paths


def _log(run_dir: Path) -> list[dict[str, float]]:
    """Accuracy of pretraining by step."""
    path = run_dir / "log.jsonl"
    if not path.is_file():  # a checkpoint that was copied out of its run directory
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: line[key] for key in ("step", "mlm_accuracy")} for line in lines]


def _row(
    work: Path, task: str, starts: dict[str, tuple[tuple[str, ...], Path]], num_seeds: int
) -> dict[str, Any]:
    """A task's dev accuracies for each start: every run's by epoch, and the mean of their best."""
    row: dict[str, Any] = {}
    for start in (start for start, (names, _) in starts.items() if task in names):
        places = [work / start / task / f"seed={42 + i}" / "result.json" for i in range(num_seeds)]
        results = [json.loads(place.read_text(encoding="utf-8")) for place in places]
        accuracies = [result["best"]["accuracy"] for result in results]
        row[start] = {
            "accuracy": statistics.mean(accuracies),
            "deviation": statistics.stdev(accuracies) if num_seeds > 1 else 0.0,
            "f1": statistics.mean(result["best"]["f1"] for result in results),
            "by_epoch": [[line["accuracy"] for line in r["epochs"]] for r in results],
        }
        row |= {"majority": results[0]["majority"]["accuracy"]}
        row |= {"num_trained_on": results[0]["num_trained_on"], "data": results[0]["data"]}
    return row


def _print(figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    starts = [s for s in STARTS if any(s in row for row in figures["tasks"].values())]
    titles = [start.replace("_", " ") for start in starts]
    table = Table("task", "trained on", *titles, "majority class", title="dev accuracy, best epoch")
    for task, row in figures["tasks"].items():
        cells = [
            f"{row[s]['accuracy']:.2%} ± {row[s]['deviation']:.2%}" if s in row else ""
            for s in starts
        ]
        table.add_row(task, f"{row['num_trained_on']:,}", *cells, f"{row['majority']:.2%}")
    Console(highlight=False).print(table)


def draw(figures: dict[str, Any], picture: Path) -> None:
    """Plot every seed's dev accuracy by epoch, with a colour for each start."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = figures["tasks"]
    figure, axes = plt.subplots(
        1, len(rows), figsize=(3.6 * len(rows), 3.4), layout="constrained", squeeze=False
    )
    for axis, (task, row) in zip(axes[0], rows.items(), strict=True):
        for start in (start for start in STARTS if start in row):
            for number, line in enumerate(row[start]["by_epoch"]):
                label = start.replace("_", " ") if number == 0 else None
                epochs = range(1, len(line) + 1)
                axis.plot(epochs, line, color=STARTS[start], marker="o", label=label, alpha=0.8)
        axis.axhline(row["majority"], color="grey", linestyle=":", label="majority class")
        axis.set_title(f"{task}, {row['num_trained_on']:,} examples")
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("dev accuracy")
    axes[0][0].legend()
    figure.savefig(picture, dpi=110)
    plt.close(figure)
