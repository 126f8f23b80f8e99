"""`clue-ds bench finetune`: time fine-tuning against transformers' Trainer on the same examples.

Before anything is timed, the losses of both on the same first batches, from the same weights with
dropout off, must agree. Each is then timed with the recipe's settings and its own defaults for the
rest (Trainer: its padding collator and AdamW), from tokenized examples to the end of the epoch.
They take turns, and the medians over whole passes are compared. Of a task with choices, only
questions with the most frequent number of choices are used, because Trainer's collator can't batch
different numbers.
"""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clue_ds.benchmarks.description import write_results
from clue_ds.data import Tokenizer
from clue_ds.errors import UserError
from clue_ds.export import huggingface
from clue_ds.model.finetuned import FineTuned
from clue_ds.presets import ModelConfig, get
from clue_ds.tasks import encoded as encodings
from clue_ds.tasks import examples, features, kinds, registry
from clue_ds.tasks.encoded import Encoded
from clue_ds.tasks.finetune import loop
from clue_ds.tasks.finetune.loop import Recipe
from clue_ds.tasks.kinds import Kind
from clue_ds.tasks.kinds.tag.schemes import IGNORED

RATED = ("choice", "cloze")  # kinds whose units have several sequences


def _class(target: Any) -> dict[str, Any]:
    return {"labels": int(target)}


def _span(target: Any) -> dict[str, Any]:
    begin, end = target
    return {"start_positions": begin, "end_positions": end}


def _tags(target: Any) -> dict[str, Any]:
    return {"labels": [IGNORED, *target.tolist(), IGNORED]}


# What transformers' model calls the target, and the collator of Trainer, where a kind needs others.
TARGETS: dict[str, Callable[[Any], dict[str, Any]]] = {"span": _span, "tag": _tags}
COLLATORS = {
    "choice": "DataCollatorForMultipleChoice",
    "cloze": "DataCollatorForMultipleChoice",
    "tag": "DataCollatorForTokenClassification",
}
# For four layers in fp32 on one device, where the two add in different orders.
LOSS_TOLERANCE = 1e-5


def finetune(
    data: Path,
    vocab: Path,
    output: Path | None = None,
    task: str = "tnews",
    preset: str = "roberta_tiny_clue",
    num_examples: int = 800,
    turns: int = 3,
) -> None:
    """Time an epoch of a task on this machine, ours against transformers' Trainer.

    Args:
        data: the directory that holds the tasks' files.
        vocab: vocab.txt.
        output: JSON file for the figures, with device, versions and command.
        task: a task of CLUE.
        preset: shape of the model; its weights are random.
        num_examples: training examples (of cloze: blanks) per pass.
        turns: passes of each contender; they take turns.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise UserError("transformers' Trainer needs accelerate; run: pip install accelerate")
    row = registry.get(task)
    kind = kinds.of(row)
    read = examples.read(row, examples.find(row, data, "train"))
    tokenizer = Tokenizer(vocab)
    config = get(preset).replace(vocab_size=tokenizer.vocab_size)
    settings = row.settings_for(config)
    recipe = Recipe(
        1,
        settings.batch_size,
        settings.lr,
        settings.warmup_ratio,
        max_length=settings.max_length,
    )
    kept = read[: 4 * num_examples]
    whole = encodings.encode(kind, tokenizer, kept, settings.max_length)
    batch, dev = _first(whole, num_examples), encodings.first(whole)
    with tempfile.TemporaryDirectory() as directory:
        model = _write_model(kind, config, vocab, Path(directory))
        difference = _check_losses(kind, config, model, batch, tokenizer.pad_id, recipe)
        seconds: dict[str, list[float]] = {"clue_ds": [], "Trainer": []}
        for turn in range(-1, turns):  # the first turn is a warm-up
            ours = _ours(kind, config, batch, dev, tokenizer.pad_id, recipe)
            theirs = _theirs(kind, model, batch, recipe, Path(directory))
            if turn >= 0:
                seconds["clue_ds"].append(ours)
                seconds["Trainer"].append(theirs)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rates = {name: len(batch.units) / value for name, value in medians.items()}
    figures = {
        "benchmark": "finetune",
        "task": task,
        "preset": preset,
        "num_examples": len(batch.units),
        "num_sequences": sum(len(unit.rows) for unit in batch.units),
        "batch_size": recipe.batch_size,
        "max_length": recipe.max_length,
        "largest_loss_difference": difference,
        "seconds": seconds,
        "examples_per_second": rates,
        "ratio": medians["Trainer"] / medians["clue_ds"],
    }
    for name, rate in rates.items():
        print(f"{name:>8}  {rate:8.1f} examples/s")
    print(f"clue_ds is {figures['ratio']:.2f} times as fast; losses differ by {difference:.1e}")
    if output is not None:
        write_results(output, figures)


def _first(encoded: Encoded, count: int) -> Encoded:
    """The first units, of those with the most frequent number of sequences."""
    usual = Counter(len(unit.rows) for unit in encoded.units).most_common(1)[0][0]
    kept = [i for i, unit in enumerate(encoded.units) if len(unit.rows) == usual][:count]
    units, targets = ([part[i] for i in kept] for part in (encoded.units, encoded.targets))
    return Encoded(encoded.examples, units, targets, encoded.bounds)


def _write_model(kind: Kind, config: ModelConfig, vocab: Path, directory: Path) -> Path:
    """Write a model with random weights that both contenders load."""
    network = kind.network(config, 42)
    return huggingface.write(
        config,
        network.state_dict(),
        vocab,
        directory / "model",
        finetuned=FineTuned(kind.task.labels, architecture=kind.architecture),
    )


def _peer(kind: Kind, model: Path) -> Any:
    import transformers

    return getattr(transformers, kind.architecture).from_pretrained(model)


def _check_losses(
    kind: Kind, config: ModelConfig, model: Path, batch: Encoded, pad_id: int, recipe: Recipe
) -> float:
    """The largest difference between the two losses over at most four batches, dropout off.

    The units have one size, the most frequent: with padding, the loss of transformers' model for
    span reading depends on the amount of padding, and ours does not.
    """
    network: nn.Module = kind.network(config, 42).eval()
    peer = _peer(kind, model).eval()
    ((usual, _),) = Counter(unit.size for unit in batch.units).most_common(1)
    same = [i for i, unit in enumerate(batch.units) if unit.size == usual][: 4 * recipe.batch_size]
    differences = []
    for begin in range(0, len(same), recipe.batch_size):
        rows = same[begin : begin + recipe.batch_size]
        units, targets = ([part[i] for i in rows] for part in (batch.units, batch.targets))
        inputs = features.collate_units(units, pad_id)
        named = [TARGETS.get(kind.task.kind, _class)(target) for target in targets]
        labels = {name: torch.tensor([one[name] for one in named]) for name in named[0]}
        with torch.inference_mode():
            ours = kind.loss(network(**inputs), units, targets)
            lengths = inputs.pop("lengths")
            mask = torch.arange(inputs["input_ids"].shape[1]) < lengths[:, None]
            given = {**inputs, "attention_mask": mask.long()}
            if kind.task.kind in RATED:
                given = {n: tensor.unflatten(0, (len(rows), -1)) for n, tensor in given.items()}
            theirs = peer(**given, **labels).loss
        differences.append(abs(float(ours - theirs)))
    if max(differences) > LOSS_TOLERANCE:
        raise UserError(
            f"the two losses differ by {max(differences):.2e}, more than {LOSS_TOLERANCE:.0e}, so "
            "nothing was timed"
        )
    return max(differences)


def _ours(
    kind: Kind, config: ModelConfig, batch: Encoded, dev: Encoded, pad_id: int, recipe: Recipe
) -> float:
    network = kind.network(config, 42)
    begin = time.perf_counter()
    loop.train(network, kind, batch, dev, pad_id, recipe)
    return time.perf_counter() - begin


def _theirs(kind: Kind, model: Path, batch: Encoded, recipe: Recipe, directory: Path) -> float:
    import transformers

    tokenizer = transformers.BertTokenizer.from_pretrained(model)
    rows = []
    for unit, target in zip(batch.units, batch.targets, strict=True):
        inputs: dict[str, list[Any]] = {
            "input_ids": [row.input_ids.tolist() for row in unit.rows],
            "token_type_ids": [_types(row) for row in unit.rows],
        }
        if kind.task.kind not in RATED:
            inputs = {name: only for name, (only,) in inputs.items()}
        rows.append({**inputs, **TARGETS.get(kind.task.kind, _class)(target)})
    collator: Any = getattr(transformers, COLLATORS.get(kind.task.kind, "DataCollatorWithPadding"))(
        tokenizer
    )
    arguments = transformers.TrainingArguments(
        output_dir=str(directory / "trainer"),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.lr,
        weight_decay=recipe.weight_decay,
        warmup_steps=0,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        model=_peer(kind, model), args=arguments, train_dataset=rows, data_collator=collator
    )
    begin = time.perf_counter()
    trainer.train()
    return time.perf_counter() - begin


def _types(row: features.Features) -> list[int]:
    return [int(i >= row.num_first) for i in range(len(row.input_ids))]
