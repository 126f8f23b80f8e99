"""The training loop of fine-tuning: train for some epochs, keep the one with the best dev accuracy.

Guarantees: the recipe's seed determines everything, and torch's global generator is left alone; a
killed run continues bit for bit from `state_file` (dropout is a function of seed and step, so there
is no generator state to restore); a run that is asked to stop saves its state first; batches are
padded only to their longest text; LayerNorm and biases have no weight decay; several ranks make the
same update as one, up to rounding and dropout.

Rejected: keeping every epoch's weights on disk (nobody needs any but the best).
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clue_ds import dist
from clue_ds.errors import UserError
from clue_ds.job import watchdog
from clue_ds.pretrain import optim, schedule
from clue_ds.pretrain.engine import dropout_seed
from clue_ds.tasks import features
from clue_ds.tasks.features import Features
from clue_ds.tasks.finetune import measures, state
from clue_ds.tasks.finetune.updater import RanksUpdater, Updater
from clue_ds.tasks.heads import BertForSequenceClassification

Precision = Literal["fp32", "bf16"]
OnStep = Callable[[int, int, float], None]
OnEpoch = Callable[[dict[str, Any]], None]

# Texts are shuffled, then sorted by length within buckets of this many batches.
BATCHES_PER_BUCKET = 16
EVALUATION_BATCH_SIZE = 128


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of a run. The defaults suit a few thousand short texts."""

    epochs: int = 3
    batch_size: int = 32  # examples per step, over all ranks
    lr: float = 5e-5  # peak of a linear warm-up and decay
    warmup_ratio: float = 0.1  # fraction of the steps
    weight_decay: float = 0.01
    gradient_clipping: float = 1.0
    max_length: int = 128  # tokens; never more than the model's positions
    seed: int = 42  # of the head's weights, the order of examples and dropout
    patience: int = 0  # epochs without a better dev accuracy before training stops; 0: never
    precision: Precision = "fp32"  # of the forward pass; weights are fp32
    save_every: int = 500  # steps between saved states; each epoch's end is saved as well


class Encoded(NamedTuple):
    """Tokenized examples with the ids of their classes."""

    texts: Sequence[Features]
    targets: Tensor  # int64 [texts]


class Stopped(Exception):
    """The job was asked to stop; its state is saved, and the same run can be continued."""


class Outcome(NamedTuple):
    """The results of training; the network itself holds the best epoch's weights."""

    epochs: list[dict[str, Any]]  # the line of each epoch, see `_measure`
    best: dict[str, Any]  # the best epoch's line
    predictions: list[int]  # the best epoch's class for each example of dev
    losses: list[float]  # of each step


@dataclass
class TrainingState:
    """Everything that changes during training except weights and optimizer moments."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    best_predictions: list[int] = field(default_factory=list)


def train(
    network: BertForSequenceClassification,
    examples: Encoded,
    dev: Encoded,
    pad_id: int,
    recipe: Recipe,
    state_file: Path | None = None,
    on_step: OnStep | None = None,
    on_epoch: OnEpoch | None = None,
) -> Outcome:
    """Train `network` in place and leave it with the weights of the epoch that was best on `dev`.

    `state_file`: the file for the state to resume from; training continues from it if it exists,
    and the caller removes it in the end. Without it, requests to stop are ignored. `on_step` is
    called with (step, number of steps, loss), `on_epoch` with each epoch's line.
    """
    plan = [_epoch(examples.texts, recipe.batch_size, recipe.seed, e) for e in range(recipe.epochs)]
    ends = np.cumsum([len(batches) for batches in plan]).tolist()
    steps = [rows for batches in plan for rows in batches]
    updater = _updater(network, recipe, len(steps))
    progress, watch = TrainingState(), watchdog.current()
    if state_file is not None and state_file.exists():
        progress = _resume(state_file, updater)
    for step in range(progress.step, len(steps)):
        if _is_over(progress.epochs, recipe):
            break
        network.train()
        loss = _step(updater, examples, steps[step], pad_id, recipe, step, len(steps))
        _check_finite(loss, step)
        progress.losses.append(loss)
        progress.step = step + 1
        stops = watch.step(step + 1) and state_file is not None and step + 1 < len(steps)
        if on_step is not None:
            on_step(step + 1, len(steps), loss)
        if step + 1 in ends:
            epoch = ends.index(step + 1)
            with watch.section("evaluate"):
                _measure(network, dev, pad_id, progress, epoch, len(plan[epoch]))
            if on_epoch is not None:
                on_epoch(progress.epochs[-1])
        saves = stops or step + 1 in ends or (step + 1) % recipe.save_every == 0
        if state_file is not None and saves:
            with watch.section("save"):
                _save(state_file, updater, progress)
        if stops:
            raise Stopped(f"stopped on request after step {step + 1} of {len(steps)}")
    network.load_state_dict(progress.best_weights)
    best = _best(progress.epochs)
    return Outcome(progress.epochs, best, progress.best_predictions, progress.losses)


def _best(epochs: list[dict[str, Any]]) -> dict[str, Any]:
    """The first of the epochs with the highest dev accuracy."""
    return max(epochs, key=lambda line: line["accuracy"])


def _is_over(epochs: list[dict[str, Any]], recipe: Recipe) -> bool:
    if not recipe.patience or not epochs:
        return False
    return epochs[-1]["epoch"] - _best(epochs)["epoch"] >= recipe.patience


def _check_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise UserError(
            f"the loss is {loss} at step {step + 1}: training diverged; try a smaller learning "
            "rate or another seed"
        )


def _measure(
    network: BertForSequenceClassification,
    dev: Encoded,
    pad_id: int,
    progress: TrainingState,
    epoch: int,
    num_steps: int,
) -> None:
    """Add the epoch's line {epoch, step, loss, accuracy, f1}; keep its weights if they are best."""
    predictions = classify(network, dev.texts, pad_id)
    scores = measures.scores(dev.targets.tolist(), predictions, network.classifier.out_features)
    loss = float(np.mean(progress.losses[-num_steps:]))
    progress.epochs.append({"epoch": epoch + 1, "step": progress.step, "loss": loss, **scores})
    if _best(progress.epochs) is progress.epochs[-1]:
        progress.best_weights = copy.deepcopy(network.state_dict())
        progress.best_predictions = predictions


# ------------------------------------------------------------------------------------- one step


class LocalUpdater:
    """One process: torch's AdamW on fp32 weights."""

    def __init__(self, network: BertForSequenceClassification, recipe: Recipe) -> None:
        self.network, self.recipe = network, recipe
        self.optimizer = _optimizer(network, recipe.weight_decay)

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.network(**inputs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        clipping = self.recipe.gradient_clipping
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), clipping)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def _updater(network: BertForSequenceClassification, recipe: Recipe, num_steps: int) -> Updater:
    """LocalUpdater, or on several ranks DeepSpeed's engine with the same methods."""
    if dist.world_size() == 1:
        return LocalUpdater(network, recipe)
    decay, clipping = recipe.weight_decay, recipe.gradient_clipping
    return RanksUpdater(network, recipe.batch_size, decay, clipping, num_steps)


def _step(
    updater: Updater,
    examples: Encoded,
    rows: list[int],
    pad_id: int,
    recipe: Recipe,
    step: int,
    num_steps: int,
) -> float:
    """Update the weights with the examples `rows`; return their mean loss over all ranks."""
    network = updater.network
    device = next(network.parameters()).device
    rank, num_ranks = dist.rank(), dist.world_size()
    mine = rows[rank::num_ranks] or rows[:1]  # a short last batch may leave none for this rank
    # The engine averages over ranks, which may hold different numbers of examples. A rank without
    # any computes the first one with weight 0.
    weight = len(rows[rank::num_ranks]) * num_ranks / len(rows)
    inputs = features.collate([examples.texts[i] for i in mine], pad_id)
    with _dropout(recipe.seed, step, device), _precision(recipe, device):
        logits = updater.forward(**{name: tensor.to(device) for name, tensor in inputs.items()})
    loss = F.cross_entropy(logits.float(), examples.targets[mine].to(device)) * weight
    updater.backward(loss)
    warmup_steps = int(recipe.warmup_ratio * num_steps)
    scale = schedule.lr_scale(step, steps=num_steps, warmup_steps=warmup_steps, schedule="linear")
    updater.step(recipe.lr * scale)
    return dist.all_reduce([loss.item()])[0] / num_ranks


@contextlib.contextmanager
def _dropout(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """Seed dropout for this step and rank; restore the global generator afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(dropout_seed(seed, step))
        yield


def _precision(recipe: Recipe, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16")


def _epoch(encoded: Sequence[Features], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Shuffled batches of indices: every example once, texts of similar length together."""
    draws = np.random.default_rng((seed, epoch))
    order = draws.permutation(len(encoded))
    bucket = batch_size * BATCHES_PER_BUCKET
    batches = []
    for start in range(0, len(order), bucket):
        rows = sorted(
            order[start : start + bucket].tolist(), key=lambda i: len(encoded[i].input_ids)
        )
        batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    return [batches[i] for i in draws.permutation(len(batches))]


def _optimizer(network: torch.nn.Module, weight_decay: float) -> torch.optim.AdamW:
    groups = optim.parameter_groups(network, weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-6)


# ------------------------------------------------------------------------------------ resuming


def _save(path: Path, updater: Updater, progress: TrainingState) -> None:
    """Replace the state file, on rank 0."""
    if dist.rank() == 0:
        saved = {
            "network": updater.network.state_dict(),
            "optimizer": updater.optimizer.state_dict(),
            "progress": vars(progress),
        }
        state.save(path, saved)
    dist.barrier()


def _resume(path: Path, updater: Updater) -> TrainingState:
    saved = state.load(path)
    updater.network.load_state_dict(saved["network"])
    updater.optimizer.load_state_dict(saved["optimizer"])
    return TrainingState(**saved["progress"])


# ---------------------------------------------------------------------------------- classifying


@torch.inference_mode()
def classify(
    network: BertForSequenceClassification, encoded: Sequence[Features], pad_id: int
) -> list[int]:
    """The most probable class of every text, in order. Ranks share the work; all get the result."""
    network.eval()
    watch = watchdog.current()
    device = next(network.parameters()).device
    rank, num_ranks = dist.rank(), dist.world_size()
    mine = [0] * len(encoded[rank::num_ranks])
    for rows in features.batches_by_length(encoded[rank::num_ranks], EVALUATION_BATCH_SIZE):
        texts = [encoded[rank + i * num_ranks] for i in rows]
        inputs = features.collate(texts, pad_id)
        logits = network(**{name: tensor.to(device) for name, tensor in inputs.items()})
        for row, choice in zip(rows, logits.argmax(-1).tolist(), strict=True):
            mine[row] = choice
        watch.mark()
    result = [0] * len(encoded)
    for number, classes in enumerate(dist.all_gather(mine)):
        result[number::num_ranks] = classes
    return result
