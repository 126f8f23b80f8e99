"""`clue-ds bench evidence`: does pretraining help? The same network, pretrained and from scratch.

The unlabelled training texts of the tasks, and text files of the user's, are pretrained on; then
both networks are fine-tuned with the same examples, settings and seeds. Dev and test texts are
never pretrained on. Every step is a verb that a user could type; a killed run continues.
"""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from clue_ds.benchmarks.environment import describe
from clue_ds.errors import UserError, existing_file
from clue_ds.tasks import examples, registry

TASKS = ("tnews", "iflytek", "afqmc", "cmnli")
KINDS = ("pretrained", "from_scratch")


def evidence(
    data: Path,
    vocab: Path,
    config: Path,
    corpora: tuple[Path, ...] = (),
    checkpoint: Path | None = None,
    work: Path = Path("runs/evidence"),
    output: Path | None = None,
    tasks: tuple[str, ...] = TASKS,
    seeds: int = 3,
    limit: int = 10_000,
    epochs: int = 3,
    lr: float = 3e-4,
    max_length: int = 64,
) -> None:
    """Pretrain on the tasks' unlabelled texts, then fine-tune against random weights.

    Args:
        data: directory of the tasks' files.
        vocab: vocab.txt.
        config: what to pretrain (docs/examples/evidence.yaml).
        corpora: further text files, a sentence a line, a blank line between documents.
        checkpoint: a run that is trained already, instead of pretraining one.
        work: where texts, corpus and runs go; a killed command continues there.
        output: JSON file for the figures; a picture goes beside it.
        tasks: what is fine-tuned.
        seeds: runs of each task and kind.
        limit: most examples to fine-tune on; the dev split is always whole.
        epochs: of fine-tuning.
        lr: of fine-tuning.
        max_length: tokens of a text when fine-tuning.
    """
    existing_file(vocab, "vocabulary")
    existing_file(config, "config file")
    work.mkdir(parents=True, exist_ok=True)
    if checkpoint is None:
        checkpoint = _pretrain(work, data, vocab, config, corpora)
    model = work / "model"
    if not model.exists():
        _verb("export", checkpoint, "--to", "hf", "--output", model)
    for kind in KINDS:
        settings = ["--seeds", seeds, "--limit", limit, "--epochs", epochs, "--lr", lr]
        settings += ["--max-length", max_length, "--precision", "bf16", "--task", *tasks]
        settings += ["--from-scratch"] if kind == "from_scratch" else []
        _verb("finetune", "--model", model, "--data", data, "--output", work / kind, *settings)
    figures = {"benchmark": "evidence", "log": _log(checkpoint), **_figures(work, tasks, seeds)}
    _print(figures)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({"environment": describe(), **figures}, indent=1) + "\n")
        draw(figures, output.with_suffix(".png"))
        print(f"written to {output} and {output.with_suffix('.png')}")


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
    """The directory of the pretraining run."""
    corpus, run_dir = work / "corpus", work / "run"
    if not corpus.exists():
        texts = [*_write_texts(work / "text", data), *corpora]
        _verb("shard", *texts, "--vocab", vocab, "--output", corpus)
    place = ["--data.corpus", corpus, "--run_dir", run_dir]
    _verb("pretrain", "--config", config, *place)
    return run_dir


def _write_texts(directory: Path, data: Path) -> list[Path]:
    """One file a task: each training example a document, its label left out."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name in TASKS:
        task = registry.get(name)
        documents = []
        for example in examples.read(task, examples.find(task, data, "train")):
            parts = (example.text,) if isinstance(example.text, str) else example.text
            documents.append("\n".join(" ".join(part.split()) for part in parts))
        paths.append(directory / f"{name}.txt")
        paths[-1].write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    return paths


def _log(run_dir: Path) -> list[dict[str, float]]:
    """Loss and accuracy of pretraining."""
    path = run_dir / "log.jsonl"
    if not path.is_file():  # a checkpoint that was copied away from its run
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: line[key] for key in ("step", "loss", "mlm_accuracy")} for line in lines]


def _figures(work: Path, tasks: tuple[str, ...], num_seeds: int) -> dict[str, Any]:
    """Every run's dev accuracies by epoch, and their means."""
    rows: dict[str, Any] = {}
    for task in tasks:
        row: dict[str, Any] = {}
        for kind in KINDS:
            places = [
                work / kind / task / f"seed={42 + i}" / "result.json" for i in range(num_seeds)
            ]
            results = [json.loads(place.read_text(encoding="utf-8")) for place in places]
            accuracies = [result["best"]["accuracy"] for result in results]
            row[kind] = {
                "accuracy": statistics.mean(accuracies),
                "deviation": statistics.stdev(accuracies) if num_seeds > 1 else 0.0,
                "f1": statistics.mean(result["best"]["f1"] for result in results),
                "by_epoch": [[line["accuracy"] for line in r["epochs"]] for r in results],
            }
            row |= {"majority": results[0]["majority"]["accuracy"]}
            row |= {"num_trained_on": results[0]["num_trained_on"], "data": results[0]["data"]}
        rows[task] = row
    return {"num_seeds": num_seeds, "tasks": rows}


def _print(figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "trained on", "pretrained", "from scratch", "gain", "majority")
    for task, row in figures["tasks"].items():
        cells = [f"{row[k]['accuracy']:.2%} ± {row[k]['deviation']:.2%}" for k in KINDS]
        gain = 100 * (row["pretrained"]["accuracy"] - row["from_scratch"]["accuracy"])
        count, guess = f"{row['num_trained_on']:,}", f"{row['majority']:.2%}"
        table.add_row(task, count, *cells, f"{gain:+.2f}", guess)
    Console(highlight=False).print(table)


def draw(figures: dict[str, Any], picture: Path) -> None:
    """Dev accuracy by epoch of every seed, pretrained and from scratch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = figures["tasks"]
    figure, axes = plt.subplots(
        1, len(rows), figsize=(3.6 * len(rows), 3.4), layout="constrained", squeeze=False
    )
    for axis, (task, row) in zip(axes[0], rows.items(), strict=True):
        for kind, color in zip(KINDS, ("tab:blue", "tab:orange"), strict=True):
            for number, line in enumerate(row[kind]["by_epoch"]):
                label = kind.replace("_", " ") if number == 0 else None
                epochs = range(1, len(line) + 1)
                axis.plot(epochs, line, color=color, marker="o", label=label, alpha=0.8)
        axis.axhline(row["majority"], color="grey", linestyle=":", label="majority")
        axis.set_title(f"{task}, {row['num_trained_on']:,} examples")
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("dev accuracy")
    axes[0][0].legend()
    figure.savefig(picture, dpi=110)
    plt.close(figure)
