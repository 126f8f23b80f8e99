"""`clue-ds bench recipe_study`: what each part of pretraining's recipe is worth, at equal tokens.

The base is a config of pretraining. Each of VARIANTS changes one thing in it, or one thing and what
must follow from it, and trains on the same corpus and number of tokens. Then every model is scored
in two ways: by its loss on held-out text, for all with the base's masks, so that mask rates can be
compared; and by the dev accuracy of tasks after fine-tuning, with the same settings and seeds.

Dev and test texts of the tasks are never trained on. The same command continues after a kill, and
others add variants, seeds or tasks to a study that is there, also while it runs: the JSON and the
plot have all that is found in --work, and are written after every run.
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

from clue_ds import config as run_config
from clue_ds import export, files, pretrain
from clue_ds.benchmarks import evidence
from clue_ds.benchmarks.description import write_results
from clue_ds.data import Corpus
from clue_ds.data.build.command import shard
from clue_ds.data.corpus import HELD_OUT
from clue_ds.errors import UserError, existing_file
from clue_ds.model.bert import BertForPreTraining
from clue_ds.model.weights import load_into
from clue_ds.pretrain import batches, train
from clue_ds.tasks.finetune.command import finetune

BASE = "base"
FIRST_SEED = 42
TASKS = ("tnews", "iflytek", "cmnli")
HELD_OUT_SHARE = 0.02
HELD_OUT_BATCHES = 40
LOSS = "held-out loss"
ROW = "study.json"  # in a run directory: what the study keeps of it


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


def _optimizer(name: str, lr: float, **further: Any) -> Variant:
    return Variant("optimizer", {"train.optimizer": name, "train.lr": lr, **further})


VARIANTS: dict[str, Variant] = {
    BASE: Variant("base", {}),
    "muon 1.5e-3": _optimizer("muon", 1.5e-3),
    "muon 6e-3": _optimizer("muon", 6e-3),
    "adamw 5e-4": _optimizer("adamw", 5e-4),
    "adamw 1e-3": _optimizer("adamw", 1e-3),
    "adamw 2e-3": _optimizer("adamw", 2e-3),
    "lamb 2e-3": _optimizer("lamb", 2e-3, deepspeed="zero0"),
    "lamb 6e-3": _optimizer("lamb", 6e-3, deepspeed="zero0"),
    "batch x 1/2": Variant("batch", {}, batch=0.5),
    "batch x 2": Variant("batch", {}, batch=2),
    "batch x 4": Variant("batch", {}, batch=4),
    "mask 20%": Variant("mask rate", {"data.mask_prob": 0.2}),
    "mask 30%": Variant("mask rate", {"data.mask_prob": 0.3}),
    "mask 30%, then 15%": Variant("mask rate", {"data.mask_prob": 0.3}, lower_mask=0.15),
    "whole words": Variant("masked unit", {"data.whole_word": True}),
    "n-grams": Variant("masked unit", {"data.whole_word": True, "data.max_ngram": 3}),
    "initializer 0.05": Variant("initializer", {"model.initializer_range": 0.05}),
    "cosine": Variant("schedule", {"train.schedule": "cosine"}),
    "wsd": Variant("schedule", {"train.schedule": "wsd"}),
    "windows": Variant("rows", {"data.samples": "windows"}),
    "sop": Variant("objective", {"train.objective": "sop", "data.samples": "windows"}),
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
        config: config of the base (recipes/recipe_study.yaml).
        corpora: further text files, one sentence per line, a blank line between documents.
        tokens: tokens of text on which each variant is trained; default those of the config.
        variants: names of the variants to train now; default all.
        seeds: number of pretraining runs of each variant, from seed 42 on.
        tasks: tasks to fine-tune on now; none for held-out losses alone.
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
    budget = tokens or tokens_of(base)
    settings = {"limit": limit, "epochs": epochs, "lr": lr, "max_length": max_length}
    for name in variants:
        for seed in range(FIRST_SEED, FIRST_SEED + seeds):
            run_dir = directory_of(work, name, seed)
            _train(run_of(base, VARIANTS[name], budget, seed, run_dir), base)
            _finetune(run_dir, data, tasks, finetune_seeds, settings)
            _report({**settings, "variants": found(work, settings)}, output)


def directory_of(work: Path, variant: str, seed: int) -> Path:
    """The run directory of a variant's run with this seed."""
    return work / re.sub(r"[^\w.-]+", "-", variant) / f"seed={seed}"


def _make_corpus(work: Path, data: Path, vocab: Path, corpora: tuple[Path, ...]) -> Path:
    corpus = work / "corpus"
    if not corpus.exists():
        texts = [str(path) for path in (*evidence.write_texts(work / "text", data), *corpora)]
        shard(tuple(texts), output=corpus, vocab=vocab, held_out=HELD_OUT_SHARE)
    return corpus


def run_of(
    base: dict[str, Any], variant: Variant, tokens: float, seed: int, run_dir: Path
) -> dict[str, Any]:
    """The config of a variant: steps, warm-up and phases follow from its rows and the tokens.

    `base`: a whole config, with all defaults.
    """
    values, usual = copy.deepcopy(base), base["train"]
    values |= {"seed": seed, "run_dir": str(run_dir)}
    for key, value in variant.changes.items():
        *section, name = key.split(".")
        (values[section[0]] if section else values)[name] = value
    if values["train"]["optimizer"] != "muon":
        values["train"]["adamw_lr"] = None
    size = round(usual["global_batch_size"] * variant.batch)
    steps = round(tokens / (size * tokens_per_row(values)))
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


def tokens_per_row(values: dict[str, Any]) -> float:
    """Mean tokens of text in a row: each token of the corpus is in one row of an epoch."""
    config = run_config.validate(values, "the study's config")
    corpus = batches.open_data(config)
    return corpus.num_tokens / batches.make_stream(config, corpus).num_samples


def tokens_of(values: dict[str, Any]) -> float:
    """Tokens of text on which a run with these settings trains."""
    train = values["train"]
    return float(train["steps"] * train["global_batch_size"] * tokens_per_row(values))


def _train(run: dict[str, Any], base: dict[str, Any]) -> None:
    """Pretrain and write the run's row for the study, unless an earlier call has."""
    path = Path(run["run_dir"]) / ROW
    tokens = round(tokens_of(run))
    if path.is_file():
        trained = json.loads(path.read_text(encoding="utf-8"))["tokens"]
        if trained != tokens:
            raise UserError(
                f"{path} is of a run on {trained:,} tokens, and now it would have {tokens:,}; "
                "give the same --tokens and --config, or another --work"
            )
        return
    result = pretrain.run(run)
    if result.stopped:
        raise UserError("stopped on request; the same command goes on with this study")
    data = {key: run["data"][key] for key in run["data"].keys() - {"corpus", "held_out"}}
    row = {
        "seed": run["seed"],
        "settings": {"data": data, **{key: run[key] for key in ("train", "model", "phases")}},
        "tokens": tokens,
        "held_out": held_out(result.run_dir, base),
        "log": [{key: line[key] for key in ("step", "mlm_accuracy")} for line in result.lines],
    }
    files.write_json(path, row)  # another command may read it at this moment


def held_out(run_dir: Path, base: dict[str, Any]) -> dict[str, float]:
    """Loss and accuracy of a run's last model on held-out text, with the masks of the base."""
    config, state = export.load(run_dir)
    model = BertForPreTraining(config).eval()
    load_into(model, config, state, run_dir)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    values = {**base, "data": {**base["data"], "padding": "keep"}}
    corpus = Corpus(Path(base["data"]["corpus"]) / HELD_OUT)
    stream = batches.make_stream(run_config.validate(values, "the study's base"), corpus)
    loss = correct = predicted = 0.0
    with torch.inference_mode():
        for step in range(min(HELD_OUT_BATCHES, stream.steps_per_epoch)):
            batch = {key: value.to(device) for key, value in stream.batch(step).items()}
            output = model(**batch)
            loss += float(output.mlm_sum)
            correct += float(output.num_correct)
            predicted += float(output.num_predicted)
    return {"loss": loss / predicted, "accuracy": correct / predicted}


def _finetune(
    run_dir: Path, data: Path, tasks: tuple[str, ...], seeds: int, settings: dict[str, Any]
) -> None:
    if tasks:
        output = _finetuned_in(run_dir, settings)
        finetune(tasks, str(run_dir), str(data), output, seeds=seeds, precision="bf16", **settings)


def _finetuned_in(run_dir: Path, settings: dict[str, Any]) -> Path:
    values = "-".join(f"{key}={value}" for key, value in settings.items())
    return run_dir / f"finetune-{values}"


def found(work: Path, settings: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """A row for each pretraining run in `work`, by variant, with the dev accuracies of its tasks.

    Of fine-tuning, only what has these settings counts.
    """
    rows: dict[str, list[dict[str, Any]]] = {}
    for name in VARIANTS:
        for path in sorted(directory_of(work, name, FIRST_SEED).parent.glob(f"seed=*/{ROW}")):
            row = json.loads(path.read_text(encoding="utf-8"))
            row["tasks"] = {}
            results = _finetuned_in(path.parent, settings).glob("*/seed=*/result.json")
            for result in sorted(results):
                best = json.loads(result.read_text(encoding="utf-8"))["best"]
                scores = row["tasks"].setdefault(result.parent.parent.name, [])
                scores.append(best["accuracy"])
            rows.setdefault(name, []).append(row)
    return rows


def summary(figures: dict[str, Any]) -> list[list[str]]:
    """A row for each variant: its means over the runs, beside the difference to the base."""
    variants = figures["variants"]
    base = _means(variants[BASE]) if BASE in variants else {}
    columns = _columns(variants)
    table = [["factor", "variant", "runs", *columns]]
    for name, rows in variants.items():
        cells, means = [], _means(rows)
        for key in columns:
            cell = f"{means[key]:.3f}" if key in means else ""
            if name != BASE and key in means and key in base:
                cell += f" ({means[key] - base[key]:+.3f})"
            cells.append(cell)
        table.append([VARIANTS[name].factor, name, str(len(rows)), *cells])
    return table


def _columns(variants: dict[str, list[dict[str, Any]]]) -> list[str]:
    tasks = {task: None for rows in variants.values() for row in rows for task in row["tasks"]}
    return [LOSS, *tasks]


def _means(rows: list[dict[str, Any]]) -> dict[str, float]:
    means = {LOSS: statistics.mean(row["held_out"]["loss"] for row in rows)}
    for task in _columns({"these": rows})[1:]:
        means[task] = statistics.mean(score for row in rows for score in row["tasks"].get(task, []))
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
    base = _means(figures["variants"][BASE]) if BASE in figures["variants"] else {}
    columns = _columns(figures["variants"])
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
            values = [means[column] for row in rows if column in (means := _means([row]))]
            axis.plot(values, [place] * len(values), "o", color="tab:blue", alpha=0.7)
        if column in base:
            axis.axvline(base[column], color="grey", linestyle=":")
        axis.set_title(column)
        axis.grid(alpha=0.3)
    axes[0][0].set_yticks(range(len(names)), names)
    axes[0][0].invert_yaxis()
    figure.savefig(picture, dpi=110)
    plt.close(figure)
