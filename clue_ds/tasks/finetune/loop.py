"""The training loop of fine-tuning: train for some epochs, keep the one with the best dev score.

All kinds of tasks are trained here; what differs between them is what their `Kind` says.

Guarantees: the recipe's seed determines everything, and torch's global generator is left alone; a
killed run continues bit for bit from its newest state (dropout is a function of seed and step, so
there is no generator state to restore); a run that is asked to stop saves its state first; batches
are padded only to their longest sequence; LayerNorm and biases have no weight decay; several ranks
make the same update as one, up to rounding and dropout.

Rejected: keeping every epoch's weights on disk (nobody needs any but the best).
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from clue_ds import dist
from clue_ds.errors import UserError, check_least
from clue_ds.job import watchdog
from clue_ds.pretrain import optim, schedule
from clue_ds.pretrain.engine import dropout_seed
from clue_ds.tasks import encoded as encodings
from clue_ds.tasks import features
from clue_ds.tasks.encoded import Encoded
from clue_ds.tasks.features import Unit
from clue_ds.tasks.finetune.state import States
from clue_ds.tasks.finetune.updater import RanksUpdater, Updater
from clue_ds.tasks.kinds import Answer, Kind
from clue_ds.tasks.task import Precision

OnStep = Callable[[int, int, float], None]
OnEpoch = Callable[[dict[str, Any]], None]

# Units are shuffled, then sorted by length within buckets of this many batches.
BATCHES_PER_BUCKET = 16
# Sequences and tokens of a batch when dev is measured.
EVALUATION_BATCH_SIZE = 128
EVALUATION_TOKENS = 32_768


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of a run. The defaults suit a few thousand short texts."""

    epochs: int = 3
    batch_size: int = 32  # units per step, over all ranks: texts, questions, blanks, windows
    lr: float = 5e-5  # peak of a linear warm-up and decay
    warmup_ratio: float = 0.1  # fraction of the steps
    weight_decay: float = 0.01
    dropout: float | None = None  # of hidden states and attention probabilities; None: the model's
    gradient_clipping: float = 1.0
    max_length: int = 128  # tokens; never more than the model's positions
    seed: int = 42  # of the head's weights, the order of examples and dropout
    patience: int = 0  # epochs without a better dev score before training stops; 0: never
    precision: Precision = "fp32"  # of the forward pass; weights are fp32
    save_every: int = 500  # steps between saved states; each epoch's end is saved as well

    def __post_init__(self) -> None:
        """UserError if a number can't be meant."""
        for name in ("epochs", "batch_size", "save_every"):
            check_least(name, getattr(self, name), 1)
        # [CLS], a token and [SEP]
        check_least("max_length", self.max_length, 3)
        for name in ("lr", "weight_decay", "gradient_clipping", "patience"):
            check_least(name, getattr(self, name), 0)
        for name in ("warmup_ratio", "dropout"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < 1.0:
                raise UserError(f"{name} {value} must be at least 0 and less than 1")


class Stopped(Exception):
    """The job was asked to stop; its state is saved, and the same run can be continued."""


class Outcome(NamedTuple):
    """The results of training; the network itself holds the best epoch's weights."""

    epochs: list[dict[str, Any]]  # the line of each epoch, see `_measure`
    best: dict[str, Any]  # the best epoch's line
    values: list[Any]  # the best epoch's answer to each example of dev (Answer.value)
    losses: list[float]  # of each step


@dataclass
class TrainingState:
    """Everything that changes during training except weights and optimizer moments."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    best_values: list[Any] = field(default_factory=list)


def train(
    network: nn.Module,
    kind: Kind,
    examples: Encoded,
    dev: Encoded,
    pad_id: int,
    recipe: Recipe,
    states: States | None = None,
    on_step: OnStep | None = None,
    on_epoch: OnEpoch | None = None,
) -> Outcome:
    """Train `network` in place and leave it with the weights of the epoch that was best on `dev`.

    `states`: where states are saved, and the one that training continues from; the caller removes
    them in the end. Without it, requests to stop are ignored. `on_step` is called with (step,
    number of steps, loss), `on_epoch` with each epoch's line.
    """
    plan = [_epoch(examples.units, recipe.batch_size, recipe.seed, e) for e in range(recipe.epochs)]
    ends = _ends([len(batches) for batches in plan], kind.task.evaluations_per_epoch)
    steps = [rows for batches in plan for rows in batches]
    updater = _updater(network, recipe, len(steps))
    progress, watch = TrainingState(), watchdog.current()
    if states is not None and states.newest is not None:
        progress = _resume(states, updater)
    for step in range(progress.step, len(steps)):
        if _is_over(progress.epochs, recipe, kind):
            break
        network.train()
        loss = _step(updater, kind, examples, steps[step], pad_id, recipe, step, len(steps))
        _check_finite(loss, step)
        progress.losses.append(loss)
        progress.step = step + 1
        stops = watch.step(step + 1) and states is not None and step + 1 < len(steps)
        if on_step is not None:
            on_step(step + 1, len(steps), loss)
        if step + 1 in ends:
            with watch.section("evaluate"):
                _measure(network, kind, dev, pad_id, progress, ends[step + 1])
            if on_epoch is not None:
                on_epoch(progress.epochs[-1])
        saves = stops or step + 1 in ends or (step + 1) % recipe.save_every == 0
        if states is not None and saves:
            with watch.section("save"):
                _save(states, updater, progress)
        if stops:
            raise Stopped(f"stopped on request after step {step + 1} of {len(steps)}")
    network.load_state_dict(progress.best_weights)
    best = _best(progress.epochs, kind)
    return Outcome(progress.epochs, best, progress.best_values, progress.losses)


def _ends(num_steps: Sequence[int], per_epoch: int) -> dict[int, float]:
    """Step after which dev is measured -> epochs until then, a whole number at an epoch's end."""
    ends: dict[int, float] = {}
    begin = 0
    for epoch, count in enumerate(num_steps):
        for part in range(1, per_epoch + 1):
            step = begin + round(count * part / per_epoch)
            if step > begin:
                ends[step] = epoch + 1 if part == per_epoch else epoch + part / per_epoch
        begin += count
    return ends


def _best(epochs: list[dict[str, Any]], kind: Kind) -> dict[str, Any]:
    """The first of the epochs with the highest dev score."""
    return max(epochs, key=kind.best_by)


def _is_over(epochs: list[dict[str, Any]], recipe: Recipe, kind: Kind) -> bool:
    if not recipe.patience or not epochs:
        return False
    return epochs[-1]["epoch"] - _best(epochs, kind)["epoch"] >= recipe.patience


def _check_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise UserError(
            f"the loss is {loss} at step {step + 1}: training diverged; try a smaller learning "
            "rate or another seed"
        )


def _measure(
    network: nn.Module,
    kind: Kind,
    dev: Encoded,
    pad_id: int,
    progress: TrainingState,
    epoch: float,
) -> None:
    """Add the epoch's line {epoch, step, loss, scores}; keep its weights if they are best."""
    values = [answer.value for answer in evaluate(network, kind, dev, pad_id)]
    scores = kind.scores(dev.examples, values)
    begin = progress.epochs[-1]["step"] if progress.epochs else 0
    loss = float(np.mean(progress.losses[begin:]))
    progress.epochs.append({"epoch": epoch, "step": progress.step, "loss": loss, **scores})
    if _best(progress.epochs, kind) is progress.epochs[-1]:
        progress.best_weights = copy.deepcopy(network.state_dict())
        progress.best_values = values


# ------------------------------------------------------------------------------------- one step


class LocalUpdater:
    """One process: torch's AdamW on fp32 weights."""

    def __init__(self, network: nn.Module, recipe: Recipe) -> None:
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


def _updater(network: nn.Module, recipe: Recipe, num_steps: int) -> Updater:
    """LocalUpdater, or on several ranks DeepSpeed's engine with the same methods."""
    if dist.world_size() == 1:
        return LocalUpdater(network, recipe)
    decay, clipping = recipe.weight_decay, recipe.gradient_clipping
    return RanksUpdater(network, recipe.batch_size, decay, clipping, num_steps)


def _step(
    updater: Updater,
    kind: Kind,
    examples: Encoded,
    rows: list[int],
    pad_id: int,
    recipe: Recipe,
    step: int,
    num_steps: int,
) -> float:
    """Update the weights with the units `rows`; return their mean loss over all ranks."""
    network = updater.network
    device = next(network.parameters()).device
    rank, num_ranks = dist.rank(), dist.world_size()
    mine = rows[rank::num_ranks] or rows[:1]  # a short last batch may leave none for this rank
    units, targets = [examples.units[i] for i in mine], [examples.targets[i] for i in mine]
    # The engine averages over ranks, which may hold different numbers of losses. A rank without
    # any unit computes the first one with weight 0.
    weight = 0.0
    if rows[rank::num_ranks]:
        whole = kind.count([examples.units[i] for i in rows], [examples.targets[i] for i in rows])
        weight = kind.count(units, targets) * num_ranks / whole
    inputs = features.collate_units(units, pad_id)
    with _dropout(recipe.seed, step, device), _precision(recipe, device):
        outputs = updater.forward(**{name: tensor.to(device) for name, tensor in inputs.items()})
    loss = kind.loss(outputs, units, targets) * weight
    updater.backward(loss)
    warmup_steps = int(recipe.warmup_ratio * num_steps)
    scale = schedule.lr_scale(step, steps=num_steps, warmup_steps=warmup_steps, schedule="linear")
    updater.step(recipe.lr * scale)
    return dist.all_reduce([loss.item()])[0] / num_ranks


@contextlib.contextmanager
def _dropout(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """Seed dropout for this step and rank; restore the global generator afterwards."""
    with dist.fork_random_state(device):
        torch.manual_seed(dropout_seed(seed, step))
        yield


def _precision(recipe: Recipe, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16")


def _epoch(units: Sequence[Unit], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Shuffled batches of indices: every unit once, units of similar length together."""
    draws = np.random.default_rng((seed, epoch))
    order = draws.permutation(len(units))
    bucket = batch_size * BATCHES_PER_BUCKET
    batches = []
    for start in range(0, len(order), bucket):
        rows = sorted(order[start : start + bucket].tolist(), key=lambda i: units[i].size)
        batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    return [batches[i] for i in draws.permutation(len(batches))]


def _optimizer(network: torch.nn.Module, weight_decay: float) -> torch.optim.AdamW:
    groups = optim.parameter_groups(network, weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-6, fused=True)


# ------------------------------------------------------------------------------------ resuming


def _save(states: States, updater: Updater, progress: TrainingState) -> None:
    """Publish the state, on rank 0; UserError on every rank when it can't be written."""
    error = None
    if dist.rank() == 0:
        saved = {
            "network": updater.network.state_dict(),
            "optimizer": updater.optimizer.state_dict(),
            "progress": vars(progress),
        }
        try:
            states.save(progress.step, saved)
        except UserError as refusal:
            error = str(refusal)
    dist.agree(error)


def _resume(states: States, updater: Updater) -> TrainingState:
    saved = states.load()
    updater.network.load_state_dict(saved["network"])
    updater.optimizer.load_state_dict(saved["optimizer"])
    return TrainingState(**saved["progress"])


# ------------------------------------------------------------------------------------ measuring


@torch.inference_mode()
def evaluate(network: nn.Module, kind: Kind, encoded: Encoded, pad_id: int) -> list[Answer]:
    """The answer to every example, in order. Ranks share the work; all get the result."""
    network.eval()
    watch = watchdog.current()
    device = next(network.parameters()).device
    rank, num_ranks = dist.rank(), dist.world_size()
    own = encoded.units[rank::num_ranks]
    mine: list[Any] = [None] * len(own)
    for rows in features.batches_by_length(own, EVALUATION_BATCH_SIZE, EVALUATION_TOKENS):
        units = [own[i] for i in rows]
        inputs = features.collate_units(units, pad_id)
        outputs = network(**{name: tensor.to(device) for name, tensor in inputs.items()})
        for row, raw in zip(rows, kind.raw(outputs, units), strict=True):
            mine[row] = raw
        watch.mark()
    raws: list[Any] = [None] * len(encoded.units)
    for number, found in enumerate(dist.all_gather(mine)):
        raws[number::num_ranks] = found
    return encodings.answers(kind, encoded, raws)
