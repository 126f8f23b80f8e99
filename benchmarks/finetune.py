"""`clue-ds bench finetune`: time fine-tuning against transformers' Trainer on the same examples.

Before anything is timed, the losses of both on the same batches, from the same weights with dropout
off, must agree. Each is then timed with the recipe's settings and its own defaults for the rest
(Trainer: its padding collator and AdamW), from tokenized examples to the end of the epoch. They
take turns, and the medians over whole passes are compared. A task stands for its kind.
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
        task: a task whose kind Trainer can train with its own collator: tnews, afqmc, cmrc2018.
        preset: shape of the model; its weights are random.
        num_examples: training examples per pass.
        turns: passes of each contender; they take turns.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise UserError("transformers' Trainer needs accelerate; run: pip install accelerate")
    kind = kinds.of(registry.get(task))
    if kind.task.kind not in ROWS:
        raise UserError(f"Trainer has no collator for {task}; give a task of {', '.join(ROWS)}")
    read = examples.read(kind.task, examples.find(kind.task, data, "train"))[:num_examples]
    tokenizer = Tokenizer(vocab)
    config = get(preset).replace(vocab_size=tokenizer.vocab_size)
    settings = kind.task.settings_for(config)
    recipe = Recipe(1, settings.batch_size, settings.lr, max_length=settings.max_length)
    batch = encodings.encode(kind, tokenizer, read, settings.max_length)
    with tempfile.TemporaryDirectory() as directory:
        model = _write_model(kind, config, vocab, Path(directory))
        difference = _check_losses(kind, config, model, batch, tokenizer.pad_id, recipe)
        seconds: dict[str, list[float]] = {"clue_ds": [], "Trainer": []}
        for turn in range(-1, turns):  # the first turn is a warm-up
            ours = _ours(kind, config, batch, tokenizer.pad_id, recipe)
            theirs = _theirs(kind, model, batch, recipe, Path(directory))
            if turn >= 0:
                seconds["clue_ds"].append(ours)
                seconds["Trainer"].append(theirs)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rates = {name: len(read) / value for name, value in medians.items()}
    figures = {
        "benchmark": "finetune",
        "task": task,
        "preset": preset,
        "num_examples": len(read),
        "num_sequences": len(batch.units),
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


def _write_model(kind: Kind, config: ModelConfig, vocab: Path, directory: Path) -> Path:
    """Write a model with random weights that both contenders load."""
    return huggingface.write(
        config,
        kind.network(config, Recipe.seed).state_dict(),
        vocab,
        directory / "model",
        finetuned=FineTuned(kind.task.labels, architecture=kind.architecture),
    )


def _classified(target: Any) -> dict[str, int]:
    return {"labels": int(target)}


def _span(target: Any) -> dict[str, int]:
    begin, end = target
    return {"start_positions": begin, "end_positions": end}


# Kind -> what transformers' model calls the target.
ROWS: dict[str, Callable[[Any], dict[str, int]]] = {
    "single": _classified,
    "pair": _classified,
    "span": _span,
}


def _peer(kind: Kind, model: Path) -> Any:
    import transformers

    return getattr(transformers, kind.architecture).from_pretrained(model)


def _check_losses(
    kind: Kind, config: ModelConfig, model: Path, batch: Encoded, pad_id: int, recipe: Recipe
) -> float:
    """The largest difference between the two losses over four batches, dropout off.

    The sequences have one length, the most frequent: with padding, the loss of transformers' model
    for span reading depends on the padding's amount, and ours does not.
    """
    network, peer = kind.network(config, Recipe.seed).eval(), _peer(kind, model).eval()
    ((size, _),) = Counter(unit.size for unit in batch.units).most_common(1)
    same = [i for i, unit in enumerate(batch.units) if unit.size == size][: 4 * recipe.batch_size]
    differences = []
    for begin in range(0, len(same), recipe.batch_size):
        rows = same[begin : begin + recipe.batch_size]
        units, targets = [batch.units[i] for i in rows], [batch.targets[i] for i in rows]
        inputs = features.collate_units(units, pad_id)
        named = [ROWS[kind.task.kind](target) for target in targets]
        labels = {name: torch.tensor([one[name] for one in named]) for name in named[0]}
        with torch.inference_mode():
            ours = kind.loss(network(**inputs), units, targets)
            inputs.pop("lengths")
            theirs = peer(**inputs, **labels).loss
        differences.append(abs(float(ours - theirs)))
    if max(differences) > LOSS_TOLERANCE:
        raise UserError(
            f"the two losses differ by {max(differences):.2e}, more than {LOSS_TOLERANCE:.0e}, so "
            "nothing was timed"
        )
    return max(differences)


def _ours(kind: Kind, config: ModelConfig, batch: Encoded, pad_id: int, recipe: Recipe) -> float:
    network = kind.network(config, Recipe.seed)
    end = batch.bounds[1]
    dev = Encoded(batch.examples[:1], batch.units[:end], batch.targets[:end], batch.bounds[:2])
    begin = time.perf_counter()
    loop.train(network, kind, batch, dev, pad_id, recipe)
    return time.perf_counter() - begin


def _theirs(kind: Kind, model: Path, batch: Encoded, recipe: Recipe, directory: Path) -> float:
    import transformers

    rows = [
        {
            "input_ids": row.input_ids.tolist(),
            "token_type_ids": [0] * row.num_first + [1] * (row.size - row.num_first),
            **ROWS[kind.task.kind](target),
        }
        for unit, target in zip(batch.units, batch.targets, strict=True)
        for row in unit.rows
    ]
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
        model=_peer(kind, model),
        args=arguments,
        train_dataset=rows,
        data_collator=transformers.DataCollatorWithPadding(
            transformers.BertTokenizer.from_pretrained(model)
        ),
    )
    begin = time.perf_counter()
    trainer.train()
    return time.perf_counter() - begin
