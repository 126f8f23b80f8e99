"""`clue-ds bench finetune`: time fine-tuning against transformers' Trainer on the same examples.

Before anything is timed, the losses of both on the same first batches, from the same weights with
dropout off, must agree. Each is then timed with the recipe's settings and its own defaults for the
rest (Trainer: its padding collator and AdamW), from tokenized examples to the end of the epoch.
They take turns, and the medians over whole passes are compared.
"""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

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
from clue_ds.tasks.heads import BertForSequenceClassification

TASK = "tnews"
KIND = kinds.of(registry.TASKS[TASK])
NUM_LABELS = len(registry.TNEWS_LABELS)
# For four layers in fp32 on one device, where the two add in different orders.
LOSS_TOLERANCE = 1e-5


def finetune(
    data: Path,
    vocab: Path,
    output: Path | None = None,
    preset: str = "roberta_tiny_clue",
    num_examples: int = 800,
    turns: int = 3,
) -> None:
    """Time an epoch of TNEWS on this machine, ours against transformers' Trainer.

    Args:
        data: the directory that holds the tasks' files.
        vocab: vocab.txt.
        output: JSON file for the figures, with device, versions and command.
        preset: shape of the model; its weights are random.
        num_examples: training examples per pass.
        turns: passes of each contender; they take turns.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise UserError("transformers' Trainer needs accelerate; run: pip install accelerate")
    task = registry.get(TASK)
    read = examples.read(task, examples.find(task, data, "train"))[:num_examples]
    tokenizer = Tokenizer(vocab)
    config = get(preset).replace(vocab_size=tokenizer.vocab_size)
    settings = task.settings_for(config)
    recipe = Recipe(1, settings.batch_size, settings.lr, max_length=settings.max_length)
    batch = encodings.encode(KIND, tokenizer, read, settings.max_length)
    with tempfile.TemporaryDirectory() as directory:
        model = _write_model(config, vocab, Path(directory), list(task.labels))
        difference = _check_losses(config, model, batch, tokenizer.pad_id, recipe)
        seconds: dict[str, list[float]] = {"clue_ds": [], "Trainer": []}
        for turn in range(-1, turns):  # the first turn is a warm-up
            ours = _ours(config, batch, tokenizer.pad_id, recipe)
            theirs = _theirs(model, batch, recipe, Path(directory))
            if turn >= 0:
                seconds["clue_ds"].append(ours)
                seconds["Trainer"].append(theirs)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rates = {name: len(read) / value for name, value in medians.items()}
    figures = {
        "benchmark": "finetune",
        "preset": preset,
        "num_examples": len(read),
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


def _write_model(config: ModelConfig, vocab: Path, directory: Path, labels: list[str]) -> Path:
    """Write a classifier with random weights that both contenders load."""
    network = BertForSequenceClassification(config, len(labels))
    return huggingface.write(
        config,
        network.state_dict(),
        vocab,
        directory / "model",
        finetuned=FineTuned(tuple(labels)),
    )


def _check_losses(
    config: ModelConfig, model: Path, batch: Encoded, pad_id: int, recipe: Recipe
) -> float:
    """The largest difference between the two losses over the first batches, dropout off."""
    import transformers

    network = BertForSequenceClassification(config, NUM_LABELS).eval()
    peer = transformers.BertForSequenceClassification.from_pretrained(model).eval()
    differences = []
    for begin in range(0, 4 * recipe.batch_size, recipe.batch_size):
        rows = list(range(begin, begin + recipe.batch_size))
        inputs = features.collate_units([batch.units[i] for i in rows], pad_id)
        targets = torch.tensor([batch.targets[i] for i in rows])
        with torch.inference_mode():
            ours = F.cross_entropy(network(**inputs), targets)
            lengths = inputs.pop("lengths")
            mask = torch.arange(inputs["input_ids"].shape[1]) < lengths[:, None]
            theirs = peer(**inputs, attention_mask=mask.long(), labels=targets).loss
        differences.append(abs(float(ours - theirs)))
    if max(differences) > LOSS_TOLERANCE:
        raise UserError(
            f"the two losses differ by {max(differences):.2e}, more than {LOSS_TOLERANCE:.0e}, so "
            "nothing was timed"
        )
    return max(differences)


def _ours(config: ModelConfig, batch: Encoded, pad_id: int, recipe: Recipe) -> float:
    network = BertForSequenceClassification(config, NUM_LABELS)
    dev = Encoded(batch.examples[:1], batch.units[:1], batch.targets[:1], batch.bounds[:2])
    begin = time.perf_counter()
    loop.train(network, KIND, batch, dev, pad_id, recipe)
    return time.perf_counter() - begin


def _theirs(model: Path, batch: Encoded, recipe: Recipe, directory: Path) -> float:
    import transformers

    rows = [
        {"input_ids": unit.rows[0].input_ids.tolist(), "labels": int(target)}
        for unit, target in zip(batch.units, batch.targets, strict=True)
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
        model=transformers.BertForSequenceClassification.from_pretrained(model),
        args=arguments,
        train_dataset=rows,
        data_collator=transformers.DataCollatorWithPadding(
            transformers.BertTokenizer.from_pretrained(model)
        ),
    )
    begin = time.perf_counter()
    trainer.train()
    return time.perf_counter() - begin
