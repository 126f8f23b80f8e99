"""`clue-ds bench recipe_study`: what each part of pretraining's recipe is worth, at equal tokens.

The base is a config of pretraining. Each of VARIANTS changes one thing in it, or one thing and what
must follow from it, and trains on the same corpus and number of tokens. Then every model is scored
in two ways: by its loss on held-out text, for all with the base's masks, so that mask rates can be
compared; and by the dev accuracy of tasks after fine-tuning, with the same settings and seeds.

Dev and test texts of the tasks are never trained on. The same command continues after a kill, and
adds variants or seeds to a study that is there; the JSON and the plot are written after every run.
"""

from __future__ import annotations

import copy
import json
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clue_ds import export, pretrain
from clue_ds.benchmarks import evidence
from clue_ds.benchmarks.description import write_results
from clue_ds.data import Corpus, SampleStream
from clue_ds.data.build.command import shard
from clue_ds.data.corpus import HELD_OUT
from clue_ds.errors import UserError, existing_file
from clue_ds.model.bert import BertForPreTraining
from clue_ds.model.weights import load_into
from clue_ds.pretrain import train
from clue_ds.tasks.finetune.command import finetune

BASE = "base"
FIRST_SEED = 42
TASKS = ("tnews", "iflytek", "cmnli")
HELD_OUT_SHARE = 0.02
HELD_OUT_BATCHES = 40


@dataclass(frozen=True)
class Variant:
    """`factor`: what is varied. `changes`: dotted key -> value that replaces that of the base.

    `batch`: the base's batch size times this, and its rates times the square root. `lower_mask`:
    this mask rate in the second half of the steps.
    """

    factor: str
    changes: dict[str, Any]
    batch: float = 1.0
    lower_mask: float | None = None


def _muon(lr: float) -> Variant:
    return Variant("optimizer", {"train.optimizer": "muon", "train.lr": lr})


def _lamb(lr: float) -> Variant:
    return Variant("optimizer", {"train.optimizer": "lamb", "train.lr": lr, "deepspeed": "zero0"})


VARIANTS: dict[str, Variant] = {
    BASE: Variant("base", {}),
    "lr 5e-4": Variant("rate", {"train.lr": 5e-4}),
    "lr 2e-3": Variant("rate", {"train.lr": 2e-3}),
    "muon 1.5e-3": _muon(1.5e-3),
    "muon 3e-3": _muon(3e-3),
    "muon 6e-3": _muon(6e-3),
    "lamb 2e-3": _lamb(2e-3),
    "lamb 6e-3": _lamb(6e-3),
    "batch x 1/2": Variant("batch", {}, batch=0.5),
    "batch x 2": Variant("batch", {}, batch=2),
    "batch x 4": Variant("batch", {}, batch=4),
    "mask 20%": Variant("mask rate", {"data.mask_prob": 0.2}),
    "mask 30%": Variant("mask rate", {"data.mask_prob": 0.3}),
    "mask 30%, then 15%": Variant("mask rate", {"data.mask_prob": 0.3}, lower_mask=0.15),
    "tokens": Variant("masked unit", {"data.whole_word": False}),
    "n-grams": Variant("masked unit", {"data.max_ngram": 3}),
    "initializer 0.02": Variant("initializer", {"model.initializer_range": 0.02}),
    "cosine": Variant("schedule", {"train.schedule": "cosine"}),
    "wsd": Variant("schedule", {"train.schedule": "wsd"}),
    "sop": Variant("objective", {"train.objective": "sop"}),
}
WSD_DECAY = 0.2  # of the steps


def recipe_study(
    data: Path,
    vocab: Path,
    config: Path,
    corpora: tuple[Path, ...] = (),
    tokens: int | None = None,
    variants: tuple[str, ...] = tuple(VARIANTS),
    seeds: int = 1,
    tasks: tuple[str, ...] = TASKS,
    finetune_seeds: int = 3,
    limit: int = 10_000,
    epochs: int = 3,
    lr: float = 3e-4,
    max_length: int = 64,
    work: Path = Path("runs/recipe-study"),
    output: Path | None = None,
) -> None:
    """Pretrain with one thing changed at a time, and compare held-out losses and dev scores.

    Args:
        data: the directory that holds the tasks' files.
        vocab: vocab.txt.
        config: config of the base (recipes/evidence.yaml).
        corpora: further text files, one sentence per line, a blank line between documents.
        tokens: tokens on which each variant is trained; default those of the config.
        variants: names of the variants; default all. The base is always among them.
        seeds: number of pretraining runs of each variant, from seed 42 on.
        tasks: tasks to fine-tune on; none for held-out losses alone.
        finetune_seeds: fine-tuning runs of each task and pretrained model.
        limit: most examples to fine-tune on; the dev split is always used whole.
        epochs: epochs of fine-tuning.
        lr: peak learning rate of fine-tuning.
        max_length: most tokens of a text in fine-tuning.
        work: the directory for texts, corpus and runs.
        output: JSON file for the figures; a plot is written beside it.
    """
    existing_file(vocab, "vocabulary")
    existing_file(config, "config file")
    unknown = [name for name in variants if name not in VARIANTS]
    if unknown:
        raise UserError(f"no variant {unknown[0]!r}; there are: {', '.join(VARIANTS)}")
    corpus = _make_corpus(work, data, vocab, corpora)
    places = ["--run_dir", str(work), "--data.corpus", str(corpus)]
    base = train.parse(["--config", str(config), *places]).model_dump()
    settings = {"limit": limit, "epochs": epochs, "lr": lr, "max_length": max_length}
    rows: dict[str, list[dict[str, Any]]] = {}
    for name in dict.fromkeys((BASE, *variants)):
        for seed in range(FIRST_SEED, FIRST_SEED + seeds):
            run_dir = work / re.sub(r"[^\w.-]+", "-", name) / f"seed={seed}"
            row = _trained(run_of(base, VARIANTS[name], tokens, seed, run_dir), base)
            row["tasks"] = _finetuned(run_dir, data, tasks, finetune_seeds, settings)
            rows.setdefault(name, []).append(row)
            figures = {"num_finetune_seeds": finetune_seeds, **settings, "variants": rows}
            _report(figures, output)


def _make_corpus(work: Path, data: Path, vocab: Path, corpora: tuple[Path, ...]) -> Path:
    corpus = work / "corpus"
    if not corpus.exists():
        texts = [str(path) for path in (*evidence.write_texts(work / "text", data), *corpora)]
        shard(tuple(texts), output=corpus, vocab=vocab, held_out=HELD_OUT_SHARE)
    return corpus


def run_of(
    base: dict[str, Any], variant: Variant, tokens: int | None, seed: int, run_dir: Path
) -> dict[str, Any]:
    """The config of a variant: steps, warm-up and phases follow from its batch and the tokens.

    `base`: a whole config, with all defaults.
    """
    values, usual = copy.deepcopy(base), base["train"]
    values |= {"seed": seed, "run_dir": str(run_dir)}
    for key, value in variant.changes.items():
        *section, name = key.split(".")
        (values[section[0]] if section else values)[name] = value
    size = round(usual["global_batch_size"] * variant.batch)
    length = base["data"]["seq_length"]
    if tokens is None:
        tokens = usual["steps"] * usual["global_batch_size"] * length
    steps = tokens // (size * length)
    values["train"] |= {
        "global_batch_size": size,
        "micro_batch_size": min(usual["micro_batch_size"], size),
        "steps": steps,
        "warmup_steps": usual["warmup_steps"] * steps // usual["steps"],
        "lr": values["train"]["lr"] * variant.batch**0.5,
    }
    if variant.changes.get("train.schedule") == "wsd":
        values["train"]["decay_steps"] = round(WSD_DECAY * steps)
    if variant.lower_mask is not None:
        values["phases"] = [{"until": steps // 2}, {"data": {"mask_prob": variant.lower_mask}}]
    values["evaluate"]["every"] = steps  # the comparison is made in the end, see `held_out`
    return values


def _trained(run: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Pretrain, or read what an earlier call has found."""
    found = Path(run["run_dir"]) / "study.json"
    tokens = run["train"]["steps"] * run["train"]["global_batch_size"] * run["data"]["seq_length"]
    if not found.is_file():
        result = pretrain.run(run)
        if result.stopped:
            raise UserError("stopped on request; the same command goes on with this study")
        data = {key: run["data"][key] for key in run["data"].keys() - {"corpus", "held_out"}}
        row = {
            "settings": {"data": data, **{key: run[key] for key in ("train", "model", "phases")}},
            "tokens": tokens,
            "held_out": held_out(result.run_dir, base),
            "log": [
                {key: line[key] for key in ("step", "loss", "mlm_accuracy")}
                for line in result.lines
            ],
        }
        found.write_text(json.dumps(row), encoding="utf-8")
    read: dict[str, Any] = json.loads(found.read_text(encoding="utf-8"))
    if read["tokens"] != tokens:
        raise UserError(
            f"{found} is of a run on {read['tokens']:,} tokens, and now it would have {tokens:,}; "
            "give the same --tokens and --config, or another --work"
        )
    return read


def held_out(run_dir: Path, base: dict[str, Any]) -> dict[str, float]:
    """Loss and accuracy of a run's last model on held-out text, with the masks of the base."""
    config, state = export.load(run_dir)
    model = BertForPreTraining(config).eval()
    load_into(model, config, state, run_dir)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    data = base["data"]
    stream = SampleStream(
        Corpus(Path(data["corpus"]) / HELD_OUT),
        data["seq_length"],
        base["train"]["global_batch_size"],
        base["seed"],
        data["whole_word"],
        data["mask_prob"],
        data["predictions_per_sequence"],
        max_ngram=data["max_ngram"],
    )
    loss = correct = predicted = 0.0
    with torch.inference_mode():
        for step in range(min(HELD_OUT_BATCHES, stream.steps_per_epoch)):
            batch = {key: value.to(device) for key, value in stream.batch(step).items()}
            output = model(**batch)
            loss += float(output.mlm_sum)
            correct += float(output.num_correct)
            predicted += float(output.num_predicted)
    return {"loss": loss / predicted, "accuracy": correct / predicted}


def _finetuned(
    run_dir: Path, data: Path, tasks: tuple[str, ...], seeds: int, settings: dict[str, Any]
) -> dict[str, list[float]]:
    """Dev accuracies of each task, one for each seed of fine-tuning."""
    output = run_dir / "finetune"
    if tasks:
        finetune(tasks, str(run_dir), str(data), output, seeds=seeds, precision="bf16", **settings)
    scores: dict[str, list[float]] = {}
    for task in tasks:
        for seed in range(FIRST_SEED, FIRST_SEED + seeds):
            path = output / task / f"seed={seed}" / "result.json"
            result = json.loads(path.read_text(encoding="utf-8"))
            scores.setdefault(task, []).append(result["best"]["accuracy"])
    return scores


def summary(figures: dict[str, Any]) -> list[list[str]]:
    """A row for each variant: its means over the runs, beside the difference to the base."""
    base = _means(figures["variants"][BASE])
    table = [["factor", "variant", "runs", *base]]
    for name, rows in figures["variants"].items():
        cells = [
            f"{value:.3f} ({value - base[key]:+.3f})" if name != BASE else f"{value:.3f}"
            for key, value in _means(rows).items()
        ]
        table.append([VARIANTS[name].factor, name, str(len(rows)), *cells])
    return table


def _means(rows: list[dict[str, Any]]) -> dict[str, float]:
    means = {"held-out loss": statistics.mean(row["held_out"]["loss"] for row in rows)}
    for task in rows[0]["tasks"]:
        scores = [score for row in rows for score in row["tasks"][task]]
        means[task] = statistics.mean(scores)
    return means


def _report(figures: dict[str, Any], output: Path | None) -> None:
    head, *rows = summary(figures)
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    if output is not None:
        write_results(output, {"benchmark": "recipe_study", **figures})
        draw(figures, output.with_suffix(".png"))


def draw(figures: dict[str, Any], picture: Path) -> None:
    """Plot every run's held-out loss and dev scores, with a row for each variant."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(figures["variants"])
    columns = list(_means(figures["variants"][BASE]))
    figure, axes = plt.subplots(
        1,
        len(columns),
        figsize=(3.2 * len(columns) + 1.5, 0.3 * len(names) + 1.2),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for axis, column in zip(axes[0], columns, strict=True):
        for place, name in enumerate(names):
            rows = figures["variants"][name]
            values = [_means([row])[column] for row in rows]
            axis.plot(values, [place] * len(values), "o", color="tab:blue", alpha=0.7)
        axis.axvline(_means(figures["variants"][BASE])[column], color="grey", linestyle=":")
        axis.set_title(column)
        axis.grid(alpha=0.3)
    axes[0][0].set_yticks(range(len(names)), names)
    axes[0][0].invert_yaxis()
    figure.savefig(picture, dpi=110)
    plt.close(figure)
