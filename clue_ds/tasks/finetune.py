"""Fine-tune an encoder to classify texts, and measure it on held-out ones.

Guarantees: deterministic by seed (order, dropout, head) without touching torch's global generator;
padding only to the longest text of a batch; no weight decay on LayerNorm and biases; what is saved
loads as transformers' BertForSequenceClassification.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clue_ds.data import Tokenizer
from clue_ds.errors import UserError
from clue_ds.export import huggingface, open_model
from clue_ds.model.weights import load_into
from clue_ds.pretrain import optim, schedule
from clue_ds.tasks import features
from clue_ds.tasks.features import Features, Text
from clue_ds.tasks.heads import BertForSequenceClassification

Example = tuple[Text, str]
OnStep = Callable[[int, int, float], None]

# Texts are shuffled, then sorted by length within runs of this many batches.
BATCHES_PER_BUCKET = 16
EVALUATION_BATCH_SIZE = 128


@dataclass(frozen=True)
class Recipe:
    """How the weights move. The defaults suit a few thousand short texts."""

    epochs: int = 3
    batch_size: int = 32
    lr: float = 5e-5  # peak of a linear warm-up and decay
    warmup_ratio: float = 0.1  # share of the steps
    weight_decay: float = 0.01
    gradient_clipping: float = 1.0
    max_length: int = 128  # tokens; never more than the model's positions
    seed: int = 42  # of the head, the order and dropout


class FinetuneResult(NamedTuple):
    """How well the held-out examples were classified."""

    accuracy: float
    predictions: list[str]  # a label for each of `dev`, in its order
    labels: list[str]
    losses: list[float]  # training loss of each step


def finetune(
    model: str | Path,
    train: Sequence[Example],
    dev: Sequence[Example],
    output: str | Path | None = None,
    recipe: Recipe = Recipe(),
    *,
    from_scratch: bool = False,
    task: str | None = None,
    force: bool = False,
    on_step: OnStep | None = None,
) -> FinetuneResult:
    """Train on (text or pair of texts, label) examples and classify `dev`.

    `model`: a run directory, a checkpoint or a Hugging Face directory; `from_scratch` takes its
    shape and vocabulary only and starts from random weights, for comparison. `output`: where the
    fine-tuned model goes, with `task` as its name (`force` replaces one that is there). `on_step`
    hears (step, number of steps, loss). UserError: no examples, a single label, a label in `dev`
    that `train` lacks, bad directories.
    """
    labels = _labels(train, dev)
    source = open_model(model)
    config = source.config
    huggingface.read_tokens(source.vocab_file, config.vocab_size)
    tokenizer = Tokenizer(source.vocab_file, source.lower_case)
    network = BertForSequenceClassification(config, len(labels), recipe.seed)
    if not from_scratch:
        load_into(network, config, source.state_dict, model)
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    max_length = min(recipe.max_length, config.max_position_embeddings)
    encoded, held_out = (
        [features.encode(tokenizer, text, max_length) for text, _ in examples]
        for examples in (train, dev)
    )
    targets = torch.tensor([labels.index(label) for _, label in train])
    losses = fit(network, encoded, targets, tokenizer.pad_id, recipe, on_step)
    if output is not None:
        state = network.state_dict()
        huggingface.write(
            config, state, source.vocab_file, output, source.lower_case, force, labels, task
        )
    predictions = [labels[i] for i in classify(network, held_out, tokenizer.pad_id)]
    num_right = sum(p == label for p, (_, label) in zip(predictions, dev, strict=True))
    return FinetuneResult(num_right / len(dev), predictions, labels, losses)


def fit(
    network: BertForSequenceClassification,
    encoded: Sequence[Features],
    targets: Tensor,
    pad_id: int,
    recipe: Recipe,
    on_step: OnStep | None = None,
) -> list[float]:
    """Train in place on texts with classes `targets` [texts]; returns the loss of each step."""
    device = next(network.parameters()).device
    plan = [
        rows
        for e in range(recipe.epochs)
        for rows in _epoch(encoded, recipe.batch_size, recipe.seed, e)
    ]
    warmup_steps = int(recipe.warmup_ratio * len(plan))
    optimizer = _optimizer(network, recipe.weight_decay)
    losses = []
    network.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(recipe.seed)
        for step, rows in enumerate(plan):
            scale = schedule.lr_scale(
                step, steps=len(plan), warmup_steps=warmup_steps, schedule="linear"
            )
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * scale
            inputs = features.collate([encoded[i] for i in rows], pad_id)
            logits = network(**{name: tensor.to(device) for name, tensor in inputs.items()})
            loss = F.cross_entropy(logits.float(), targets[rows].to(device))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), recipe.gradient_clipping)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            if on_step is not None:
                on_step(step + 1, len(plan), losses[-1])
    return losses


def _labels(train: Sequence[Example], dev: Sequence[Example]) -> list[str]:
    """The classes, sorted; they are what the examples to train on say."""
    if not train or not dev:
        raise UserError("there are no examples to train on, or none to measure with; give both")
    labels = sorted({label for _, label in train})
    if len(labels) < 2:
        raise UserError(f"every example to train on has the label {labels[0]!r}; give two or more")
    unknown = sorted({label for _, label in dev} - set(labels))
    if unknown:
        raise UserError(f"labels {unknown} are in dev but not in train ({labels})")
    return labels


def _epoch(
    encoded: Sequence[Features], batch_size: int, seed: int, epoch: int
) -> Iterator[list[int]]:
    """Batches of indices: every example once, texts of like length together, all shuffled."""
    draws = np.random.default_rng((seed, epoch))
    order = draws.permutation(len(encoded))
    bucket = batch_size * BATCHES_PER_BUCKET
    batches = []
    for start in range(0, len(order), bucket):
        rows = sorted(
            order[start : start + bucket].tolist(), key=lambda i: len(encoded[i].input_ids)
        )
        batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    for i in draws.permutation(len(batches)):
        yield batches[i]


def _optimizer(network: torch.nn.Module, weight_decay: float) -> torch.optim.AdamW:
    parameters = dict(network.named_parameters())
    groups = [
        {"params": [parameters[name] for name in names], "weight_decay": decay}
        for names, decay in zip(optim.group_names(network), (weight_decay, 0.0), strict=True)
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-6)


@torch.inference_mode()
def classify(
    network: BertForSequenceClassification, encoded: Sequence[Features], pad_id: int
) -> list[int]:
    """The likeliest class of every text, in order."""
    network.eval()
    device = next(network.parameters()).device
    result = [0] * len(encoded)
    for rows in features.batches_by_length(encoded, EVALUATION_BATCH_SIZE):
        inputs = features.collate([encoded[i] for i in rows], pad_id)
        logits = network(**{name: tensor.to(device) for name, tensor in inputs.items()})
        for row, choice in zip(rows, logits.argmax(-1).tolist(), strict=True):
            result[row] = choice
    return result
